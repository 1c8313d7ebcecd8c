"""Sampling against the distribution it claims, and the loop against a loop written out."""

import pytest
import torch

from lit_gpt_scratch.decoding.sampling import Sampling, generate
from lit_gpt_scratch.errors import UserError
from tests.conftest import TINY, randomised


def draw(sampling: Sampling, logits: torch.Tensor, n: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = sampling.choose(logits.expand(n, -1), generator)
    return torch.bincount(tokens, minlength=logits.numel()) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_and_top_k_shape_the_distribution(temperature: float) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5])
    torch.testing.assert_close(
        draw(Sampling(temperature, None), logits), (logits / temperature).softmax(-1), atol=0.015, rtol=0
    )
    kept = torch.tensor([False, True, False, False, True])
    expected = (logits / temperature).masked_fill(~kept, float("-inf")).softmax(-1)
    torch.testing.assert_close(draw(Sampling(temperature, 2), logits), expected, atol=0.015, rtol=0)


def test_temperature_zero_takes_the_likeliest() -> None:
    model, ids = randomised(TINY), [3, 1, 4]
    expected = list(ids)
    for _ in range(40):  # beyond the context of 24
        expected.append(int(model(torch.tensor([expected[-24:]]))[0, -1].argmax()))
    assert list(generate(model, ids, 40, Sampling(0.0), seed=0, end_of_text=-1)) == expected[3:]


def test_a_seed_decides_and_the_global_state_is_left_alone() -> None:
    model = randomised(TINY)

    def write(seed: int) -> list[int]:
        return list(generate(model, [1], 20, Sampling(2.0, None), seed, end_of_text=-1))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert write(1) == write(1)
    assert write(1) != write(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_end_of_text_ends_the_text() -> None:
    model = randomised(TINY)
    free = list(generate(model, [1], 20, Sampling(0.0), seed=0, end_of_text=-1))
    assert list(generate(model, [1], 20, Sampling(0.0), seed=0, end_of_text=free[5])) == free[: free.index(free[5])]


def test_what_cannot_be_generated_is_refused() -> None:
    model = randomised(TINY)
    with pytest.raises(UserError, match=r"prompt has 25 tokens .* context holds 24"):
        next(generate(model, [1] * 25, 1, Sampling(), 0, 0))
    for build in (
        lambda: Sampling(temperature=-1),
        lambda: Sampling(temperature=float("nan")),
        lambda: Sampling(top_k=0),
    ):
        with pytest.raises(UserError):
            build()
