"""PPO and GRPO losses by hand, by exhaustive enumeration, and against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_gpt_scratch.losses.rl import (
    adapted_kl_coefficient,
    gae,
    grpo_advantages,
    kl_k1,
    kl_k3,
    kl_penalized_rewards,
    last_token_mask,
    ppo_policy_loss,
    ppo_value_loss,
    token_entropy,
    whiten,
)

MASK = torch.tensor([[False, True, True, True], [True, True, False, False]])


def test_kl_of_a_policy_with_itself_is_zero() -> None:
    logprobs = torch.randn(3, 5)
    assert torch.equal(kl_k1(logprobs, logprobs), torch.zeros(3, 5))
    assert torch.equal(kl_k3(logprobs, logprobs), torch.zeros(3, 5))


def test_kl_estimates_are_unbiased_and_k3_is_not_negative() -> None:
    """The expectation under the policy, by summing over all tokens, is the divergence."""
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 50, 7, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum(-1)
    for estimate in (kl_k1, kl_k3):
        torch.testing.assert_close((policy.exp() * estimate(policy, reference)).sum(-1), exact)
    assert (kl_k3(policy, reference) >= 0).all()
    assert (kl_k1(policy, reference) < 0).any()


def test_score_at_the_last_token_and_penalty_at_each() -> None:
    kl = torch.tensor([[9.0, 1.0, 2.0, 3.0], [4.0, 5.0, 9.0, 9.0]])
    found = kl_penalized_rewards(torch.tensor([10.0, 20.0]), kl, MASK, 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.0, -0.5, -1.0, 8.5], [-2.0, 17.5, 0.0, 0.0]]))
    assert last_token_mask(MASK).nonzero().tolist() == [[0, 3], [1, 1]]
    assert not last_token_mask(torch.zeros(1, 3, dtype=torch.bool)).any()


def test_gae_by_hand() -> None:
    """Two tokens: r = (1, 2), V = (3, 5), gamma = 1/2, lambda = 1/4."""
    rewards, values = torch.tensor([[7.0, 1.0, 2.0]]), torch.tensor([[7.0, 3.0, 5.0]])
    mask = torch.tensor([[False, True, True]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.25)
    last = 2.0 - 5.0
    first = (1.0 + 0.5 * 5.0 - 3.0) + 0.5 * 0.25 * last
    torch.testing.assert_close(advantages, torch.tensor([[0.0, first, last]]))
    torch.testing.assert_close(returns, torch.tensor([[0.0, first + 3.0, last + 5.0]]))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_gae_matches_the_sum_in_the_paper(seed: int, gamma: float, gae_lambda: float) -> None:
    """Equation 16 literally, as a discounted sum of deltas; with replies at any position, or none."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    first, length = torch.randint(0, 4, (2, 3), generator=generator)
    place = torch.arange(6)
    mask = (place >= first[:, None]) & (place < (first + length)[:, None])
    found, returns = gae(rewards, values, mask, gamma, gae_lambda)
    for row in range(3):
        reply = mask[row].nonzero().flatten().tolist()
        for t in range(6):
            behind = [s for s in reply if s >= t] if t in reply else []
            surprise = {
                s: rewards[row, s] + (gamma * values[row, s + 1] if s + 1 in reply else 0.0) - values[row, s]
                for s in behind
            }
            expected = sum(((gamma * gae_lambda) ** (s - t) * d for s, d in surprise.items()), torch.tensor(0.0))
            assert found[row, t].item() == pytest.approx(float(expected), abs=1e-12)
    torch.testing.assert_close(returns, torch.where(mask, found + values, 0.0))


def test_values_outside_of_replies_are_ignored() -> None:
    """Even if they are NaN."""
    torch.manual_seed(0)
    rewards, values, logprobs = torch.randn(3, 2, 4)

    def all_of(noise: float) -> list[Tensor]:
        dirty = [torch.where(MASK, x, noise) for x in (rewards, values, logprobs)]
        paid = kl_penalized_rewards(torch.ones(2), dirty[2], MASK, 0.1)
        advantages, returns = gae(torch.where(MASK, dirty[0], 0.0), dirty[1], MASK, 0.9, 0.9)
        return [paid, advantages, returns, whiten(dirty[0], MASK)]

    for clean, dirty in zip(all_of(0.0), all_of(math.nan), strict=True):
        assert torch.equal(clean, dirty)
        assert (dirty[~MASK] == 0).all()


def test_whitened_values_have_mean_zero_and_variance_one() -> None:
    found = whiten(torch.tensor([[100.0, 1.0, 2.0, 3.0], [4.0, 5.0, -100.0, 100.0]]), MASK)
    torch.testing.assert_close(found[MASK], (torch.arange(1.0, 6.0) - 3.0) / math.sqrt(2.0))


def test_grpo_advantages_by_hand() -> None:
    """1 and 3 are one deviation from their mean; equal scores give 0, however their mean is rounded."""
    scores = torch.tensor([1.0, 3.0, 0.1, 0.1, 5.0, 1.0])
    torch.testing.assert_close(grpo_advantages(scores, 2), torch.tensor([-1.0, 1.0, 0.0, 0.0, 1.0, -1.0]))
    torch.testing.assert_close(grpo_advantages(scores, 2, scale=False), torch.tensor([-1.0, 1.0, 0.0, 0.0, 2.0, -2.0]))
    assert torch.equal(grpo_advantages(torch.full((3,), 0.1), 3), torch.zeros(3))


@pytest.mark.parametrize("size", [1e-3, 1.0, -1e4])
def test_differences_by_rounding_are_ignored(size: float) -> None:
    """Differences of a few units in the last place are ignored, relative differences of 1e-3 are not."""
    noise = 1 + 2e-7 * torch.tensor([[0.0, 1.0, 3.0, 1.0], [2.0, 0.0, 1.0, 0.0]])
    scores = size * noise
    assert len(scores.unique()) > 1
    assert not grpo_advantages(scores.flatten(), 4).any()
    assert not grpo_advantages(scores.flatten(), 4, scale=False).any()
    assert not whiten(scores, torch.ones(2, 4, dtype=torch.bool)).any()
    scores = size * (1 + 1e-3 * torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]))
    expected = torch.tensor([[-1.0, 1.0, -1.0, 1.0], [1.0, -1.0, 1.0, -1.0]]) * (1 if size > 0 else -1)
    torch.testing.assert_close(grpo_advantages(scores.flatten(), 4), expected.flatten(), rtol=0, atol=0.05)
    torch.testing.assert_close(whiten(scores, torch.ones(2, 4, dtype=torch.bool)), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "held"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),  # the gain is clipped at a ratio of 1.2
        (1.5, -2.0, 3.0, False),  # a bad action that became more probable is not clipped
        (0.5, 2.0, -1.0, False),
        (0.5, -2.0, 1.6, True),
    ],
)
def test_ppo_policy_loss_by_hand(ratio: float, advantage: float, loss: float, held: bool) -> None:
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    found, clipped = ppo_policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), clip=0.2)
    assert found.item() == pytest.approx(loss)
    assert clipped.item() == held
    found.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(0.0 if held else -ratio * advantage)


@pytest.mark.parametrize(
    ("value", "loss"),
    [
        (1.1, 0.5 * 0.9**2),  # within 0.2 of the old value 1: not clipped
        (1.9, 0.5 * 0.8**2),  # closer to the target 2, but clipped to 1.2
        (0.0, 0.5 * 2.0**2),  # further from 2 than the clipped value 0.8
    ],
)
def test_ppo_value_loss_by_hand(value: float, loss: float) -> None:
    values, old, returns = (torch.tensor([[x]]) for x in (value, 1.0, 2.0))
    assert ppo_value_loss(values, old, returns, clip=0.2).item() == pytest.approx(loss)
    assert ppo_value_loss(values, old, returns, clip=None).item() == pytest.approx(0.5 * (value - 2.0) ** 2)


def test_entropy_of_uniform_and_one_hot_distributions() -> None:
    logits = torch.tensor([[[0.0] * 8, [1000.0] + [0.0] * 7]])
    torch.testing.assert_close(token_entropy(logits), torch.tensor([[math.log(8), 0.0]]))


def test_kl_coefficient_follows_the_kl() -> None:
    """By a tenth of the relative deviation, which is clipped at a fifth."""
    assert adapted_kl_coefficient(0.2, kl=6.0, target=6.0) == 0.2
    assert adapted_kl_coefficient(0.2, kl=6.6, target=6.0) == pytest.approx(0.2 * 1.01)
    assert adapted_kl_coefficient(0.2, kl=600.0, target=6.0) == pytest.approx(0.2 * 1.02)
    assert adapted_kl_coefficient(0.2, kl=0.0, target=6.0) == pytest.approx(0.2 * 0.98)
