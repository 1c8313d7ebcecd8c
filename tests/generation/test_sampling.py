"""Sampled tokens against the expected distribution and against the logits processors of ``transformers``."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.sampling import Sampling

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5])


def draw(sampling: Sampling, logits: torch.Tensor, n: int = 20_000, seen: torch.Tensor | None = None) -> torch.Tensor:
    rng = random.Random(0)
    rows = logits.expand(n, -1)
    tokens = sampling.sample(rows, [rng.random() for _ in range(n)], None if seen is None else seen.expand(n, -1))
    return torch.bincount(tokens, minlength=logits.numel()) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_and_top_k_shape_the_distribution(temperature: float) -> None:
    everything = Sampling(temperature=temperature, top_k=None)
    torch.testing.assert_close(draw(everything, LOGITS), (LOGITS / temperature).softmax(-1), atol=0.015, rtol=0)
    kept = torch.tensor([False, True, False, False, True])
    expected = (LOGITS / temperature).masked_fill(~kept, float("-inf")).softmax(-1)
    torch.testing.assert_close(draw(Sampling(temperature=temperature, top_k=2), LOGITS), expected, atol=0.015, rtol=0)


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3.0),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.05, 1.0),
    min_p=st.none() | st.floats(0.01, 1.0),
    penalty=st.sampled_from([1.0, 0.7, 1.3]),
)
@settings(max_examples=60)
def test_distribution_equals_that_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, penalty: float
) -> None:
    """A token's probability is the length of its interval of uniform numbers, measured with an evenly spaced grid."""
    process = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(seed)
    logits, ids = 3 * torch.randn(1, 30), torch.randint(30, (1, 7))
    expected = process.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    expected = process.TemperatureLogitsWarper(temperature)(ids, expected)
    for warper, value in (
        (process.TopKLogitsWarper, top_k),
        (process.TopPLogitsWarper, top_p),
        (process.MinPLogitsWarper, min_p),
    ):
        expected = expected if value is None else warper(value)(ids, expected)
    seen = torch.zeros(1, 30, dtype=torch.bool)
    seen[0, ids[0]] = True
    n = 4000
    grid = [(i + 0.5) / n for i in range(n)]
    sampling = Sampling(penalty, temperature, top_k, top_p, min_p)
    found = torch.bincount(sampling.sample(logits.expand(n, -1), grid, seen.expand(n, -1)), minlength=30) / n
    torch.testing.assert_close(found, expected.softmax(-1)[0], atol=2 / n, rtol=0)


@pytest.mark.parametrize("vocabulary", [2, 65, 50_257])
def test_largest_uniform_number_chooses_a_possible_token(vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, vocabulary)
    logits[:, -1] = -torch.inf
    tokens = Sampling(temperature=1.0, top_k=None).sample(logits, [1 - 2**-53] * 50)
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    assert Sampling(top_k=None).sample(logits, [0.0] * 50).max() < vocabulary - 1


def test_invalid_parameters() -> None:
    for name, value in [
        ("temperature", -1.0), ("temperature", float("nan")), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1),
        ("min_p", -0.1), ("repetition_penalty", 0.0), ("repetition_penalty", float("nan")),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=f"{name} is {value}"):
            Sampling(**{name: value})  # type: ignore[arg-type]  # one of several fields
    for wrong in ([0.0, float("nan")], [0.0, float("inf")], [-float("inf")] * 2):
        with pytest.raises(UserError, match="diverged"):
            Sampling().sample(torch.tensor([wrong]), [0.5])
