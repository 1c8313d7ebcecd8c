"""Random initial weights have a known distribution; their sharding is tested in ``test_sharded_construction``."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from lit_gpt_scratch.model.weight_sampler import WeightSampler


class Weights(nn.Module):
    """Two parameters of the same shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.empty(shape))
        self.other = nn.Parameter(torch.empty(shape))


def drawn(weights: Weights, seed: int = 0) -> tuple[Tensor, Tensor]:
    sampler = WeightSampler(weights, seed)
    with torch.no_grad():
        sampler.normal_(weights.one, 2.0)
        sampler.normal_(weights.other, 2.0)
    return weights.one.detach(), weights.other.detach()


def test_standard_deviation_and_independence() -> None:
    one, other = drawn(Weights(300, 700))  # several blocks
    n = one.numel()
    for weight in (one, other):
        assert abs(weight.mean()) < 5 * 2.0 / math.sqrt(n)
        assert weight.std().item() == pytest.approx(2.0, rel=5 / math.sqrt(2 * n))
    rows = one[: len(one) // 2], one[len(one) // 2 :], other[: len(one) // 2]  # of different blocks and parameters
    for a, b in product(rows, rows):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].item()
        assert correlation == pytest.approx(float(a is b), abs=5 / math.sqrt(n / 2))


def test_seed_determines_the_weights() -> None:
    first, again, changed = (drawn(Weights(40, 50), seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.isclose(first, changed).any()


def test_weights_do_not_depend_on_other_parameters_or_on_the_global_generator() -> None:
    weights = Weights(40, 50)
    one, other = (weight.clone() for weight in drawn(weights))
    torch.manual_seed(123)
    torch.rand(5)
    with torch.no_grad():
        weights.other.zero_()
        WeightSampler(weights, 0).normal_(weights.other, 2.0)
    assert torch.equal(weights.other, other)
    assert torch.equal(weights.one, one)


def test_weights_are_the_same_in_every_dtype_up_to_rounding() -> None:
    exact, _ = drawn(Weights(40, 50).double())
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(drawn(Weights(40, 50).to(dtype))[0], exact.to(dtype))


def test_uniform_weights_stay_within_the_bound() -> None:
    weights = Weights(300, 700)
    with torch.no_grad():
        WeightSampler(weights, 0).uniform_(weights.one, 0.5)
    assert weights.one.min() >= -0.5
    assert weights.one.max() < 0.5
    assert weights.one.var().item() == pytest.approx(1 / 12, rel=0.01)
