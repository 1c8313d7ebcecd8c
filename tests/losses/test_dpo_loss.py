"""Preference losses by hand, and against trl on the same log-probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.losses.cross_entropy import sequence_logprobs
from lit_gpt_scratch.losses.dpo_loss import PREFERENCE_LOSSES, bradley_terry_loss, dpo_loss, ipo_loss
from lit_gpt_scratch.losses.metrics import PreferenceMetrics, ReplyLoss

POLICY = torch.tensor(
    [
        [-0.5, -1.25, -0.75, 0.0, 0.0], [-0.1, -0.2, -2.0, -0.4, -1.5], [-3.0, -0.25, 0.0, 0.0, 0.0],
        [-1.0, -0.5, -0.5, -2.5, 0.0], [-0.125, 0.0, 0.0, 0.0, 0.0], [-2.0, -1.75, 0.0, 0.0, 0.0],
    ]
)  # fmt: skip
REFERENCE = torch.tensor(
    [
        [-1.0, -1.0, -1.0, 0.0, 0.0], [-0.3, -0.1, -1.0, -0.6, -1.0], [-2.5, -0.75, 0.0, 0.0, 0.0],
        [-0.5, -0.75, -0.25, -2.0, 0.0], [-0.5, 0.0, 0.0, 0.0, 0.0], [-1.5, -1.0, 0.0, 0.0, 0.0],
    ]
)  # fmt: skip
LENGTHS = torch.tensor([3, 5, 2, 4, 1, 2])
"""Token log-probabilities of six replies: three chosen ones, then the rejected ones."""

TRL = {
    ("sigmoid", False, 0.1): 0.6761836409568787, ("sigmoid", False, 0.5): 0.6593548059463501,
    ("ipo", True, 0.1): 23.891931533813477, ("ipo", True, 0.5): 1.0297092199325562,
    ("sigmoid", True, 0.1): 0.6864287257194519, ("sigmoid", True, 0.5): 0.6673738360404968,
}  # fmt: skip
"""Results of ``DPOTrainer._compute_loss`` in trl 1.16.0, with ``completion_mask`` by their lengths: by loss
("sigmoid_norm" is what it calls the third), whether it compares means over tokens, and beta. Its rewards at 0.1:"""
TRL_REWARDS = {"chosen_reward": -0.023333340883255005, "rejected_reward": -0.0625, "margin": 0.039166659116744995}
TRL_ACCURACY = 2 / 3


def ratios(per_token: bool = False) -> tuple[Tensor, Tensor]:
    found = (POLICY - REFERENCE).sum(-1)
    return (found / LENGTHS if per_token else found).chunk(2)


@pytest.mark.parametrize(("loss", "per_token", "beta"), TRL)
def test_preference_losses_match_trl(loss: str, per_token: bool, beta: float) -> None:
    chosen, rejected = ratios(per_token)
    found = PREFERENCE_LOSSES[loss](chosen - rejected, beta, 0.0).mean()
    assert found.item() == pytest.approx(TRL[loss, per_token, beta], rel=1e-6)


def test_preference_metrics_match_trl() -> None:
    chosen, rejected = ratios()
    metric = PreferenceMetrics()
    metric.update(dpo_loss(chosen - rejected, 0.1), 0.1 * chosen, 0.1 * rejected)
    figures = {name: value.item() for name, value in metric.compute().items()}
    assert figures["loss"] == pytest.approx(TRL["sigmoid", False, 0.1], rel=1e-6)
    assert {name: figures[name] for name in TRL_REWARDS} == pytest.approx(TRL_REWARDS, rel=1e-5)
    assert figures["accuracy"] == pytest.approx(TRL_ACCURACY)


def test_preference_losses_by_hand() -> None:
    """One pair: rewards 2 and 0.5; log-probabilities -3 and -4 under the policy, -5 and -4.5 under the reference."""
    right = 1 / (1 + math.exp(-1.5))
    assert bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.5])).item() == pytest.approx(-math.log(right))
    margin = torch.tensor([(-3 + 5) - (-4 + 4.5)])  # 1.5
    at_half = 1 / (1 + math.exp(-0.5 * 1.5))
    assert dpo_loss(margin, 0.5).item() == pytest.approx(-math.log(at_half))
    both = -0.9 * math.log(at_half) - 0.1 * math.log(1 - at_half)
    assert dpo_loss(margin, 0.5, 0.1).item() == pytest.approx(both)
    assert ipo_loss(margin, 0.5).item() == pytest.approx((1.5 - 1.0) ** 2)
    assert ipo_loss(margin, 0.25, 0.1).item() == pytest.approx(0.9 * (1.5 - 2) ** 2 + 0.1 * (1.5 + 2) ** 2)


@pytest.mark.parametrize(
    ("loss", "smoothing", "best"), [("ipo", 0.0, 5.0), ("ipo", 0.2, 3.0), ("sigmoid", 0.2, 10 * math.log(4))]
)
def test_minimum_of_the_loss(loss: str, smoothing: float, best: float) -> None:
    """IPO: at 1 / (2 beta), or (1 - 2 e) times that; DPO with label smoothing: where sigmoid(beta m) is 1 - e."""
    margin = torch.tensor([best], requires_grad=True)
    PREFERENCE_LOSSES[loss](margin, 0.1, smoothing).sum().backward()
    assert margin.grad is not None
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_dpo_gradient_matches_the_paper() -> None:
    """After equation 7: beta * sigmoid(rejected reward - chosen reward), with opposite signs for the two replies."""
    chosen, rejected = torch.tensor([0.3], requires_grad=True), torch.tensor([0.8], requires_grad=True)
    dpo_loss(chosen - rejected, 0.2).sum().backward()
    weight = 0.2 / (1 + math.exp(-0.2 * (0.8 - 0.3)))
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-weight, weight))


@given(rewards=st.lists(st.tuples(st.integers(-40, 40), st.integers(-40, 40)), min_size=1, max_size=30))
@settings(deadline=None, max_examples=60)
def test_preference_metrics_by_brute_force(rewards: list[tuple[int, int]]) -> None:
    """Equal rewards are not counted as correct; calibration by its definition, bin by bin."""
    chosen, rejected = torch.tensor(rewards).float().T / 10
    metric = PreferenceMetrics()
    for start in range(0, len(rewards), 4):  # in batches, one of which may be empty
        part = slice(start, start + 4)
        metric.update(bradley_terry_loss(chosen[part], rejected[part]), chosen[part], rejected[part])
    metric.update(*torch.zeros(3, 0))
    found = {name: value.item() for name, value in metric.compute().items()}
    right = [float(a > b) for a, b in rewards]
    sure = [1 / (1 + math.exp(-abs(a - b) / 10)) for a, b in rewards]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["margin"] == pytest.approx(sum(a - b for a, b in rewards) / 10 / len(rewards), abs=1e-5)
    error = 0.0
    for n in range(15):
        inside = [place for place, share in enumerate(sure) if int(share * 15) == n or (share == 1 and n == 14)]
        error += abs(sum(right[place] - sure[place] for place in inside)) / len(rewards)
    assert found["calibration"] == pytest.approx(error, abs=1e-5)


def test_nan_is_not_hidden() -> None:
    metric = PreferenceMetrics()
    metric.update(torch.tensor([math.nan]), torch.tensor([1.0]), torch.tensor([0.0]))
    assert metric.compute()["loss"].isnan()


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_padding_is_ignored(lengths: list[int]) -> None:
    """Log-probability of a reply by a loop over its tokens, with any values before and after it."""
    logits = torch.randn(len(lengths), 7, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.full((len(lengths), 7), IGNORE_INDEX)
    expected = []
    for row, n in enumerate(lengths):
        labels[row, 1 : 1 + n] = torch.arange(n)
        expected.append(sum(logits[row, 1 + t].log_softmax(-1)[t].item() for t in range(n)))
    nats, counted = sequence_logprobs(logits, labels)
    assert nats.tolist() == pytest.approx(expected, rel=1e-5)
    metric = ReplyLoss()
    metric.update(-nats.sum(), counted.sum())
    assert metric.compute()["reply_loss"].item() == pytest.approx(-sum(expected) / sum(lengths), rel=1e-5)
