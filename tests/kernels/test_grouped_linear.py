"""Grouped linear layers against one matrix product per group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.kernels.grouped_linear import grouped_linear


def products(x: torch.Tensor, weight: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """One product per row."""
    groups = [sum(end <= row for end in ends) for row in range(ends[-1])]
    return torch.stack([x[row] @ weight[group].T for row, group in enumerate(groups)])


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any),
    shape=st.sampled_from([(8, 16), (16, 8), (5, 7), (4, 4)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    rest=st.integers(0, 3),
)
@settings(max_examples=60)
def test_equals_one_product_per_row(sizes: list[int], shape: tuple[int, int], dtype: torch.dtype, rest: int) -> None:
    """Groups may be empty, rows may belong to no group, and rows may have any number of bytes."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    x = torch.randn(ends[-1] + rest, shape[1], generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(len(sizes), *shape, generator=generator, dtype=torch.float64).to(dtype)
    given_x, given_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    found = grouped_linear(given_x, given_weight, torch.tensor(ends, dtype=torch.int32))
    assert found.shape == (len(x), shape[0])
    assert found.dtype == dtype
    x.requires_grad_()
    weight.requires_grad_()
    expected = products(x, weight, ends)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(found[: ends[-1]], expected, rtol=tolerance, atol=tolerance)
    assert not found[ends[-1] :].any()
    target = torch.randn(expected.shape, generator=generator).to(dtype)
    (found[: ends[-1]] * target).sum().backward()
    (expected * target).sum().backward()
    torch.testing.assert_close(given_x.grad, x.grad, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(given_weight.grad, weight.grad, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("width", [8, 10])
def test_autocast_casts_to_bfloat16(width: int) -> None:
    x, weight, ends = torch.randn(6, width), torch.randn(2, 8, width), torch.tensor([2, 6], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        found = grouped_linear(x, weight, ends)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, grouped_linear(x.bfloat16(), weight.bfloat16(), ends))
