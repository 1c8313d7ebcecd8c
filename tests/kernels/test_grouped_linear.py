"""Grouped linear layers against one matrix product per group."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.kernels import grouped_linear as grouped_linear_module
from lit_gpt_scratch.kernels.grouped_linear import grouped_linear


def products(x: torch.Tensor, weight: torch.Tensor, ends: list[int], bias: torch.Tensor | None) -> torch.Tensor:
    """One product per row."""
    groups = [sum(end <= row for end in ends) for row in range(ends[-1])]
    biases = [0.0] * len(weight) if bias is None else bias
    return torch.stack([x[row] @ weight[group].T + biases[group] for row, group in enumerate(groups)])


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any),
    shape=st.sampled_from([(8, 16), (16, 8), (5, 7), (4, 4)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    rest=st.integers(0, 3),
    biased=st.booleans(),
)
@settings(max_examples=60)
def test_equals_one_product_per_row(
    sizes: list[int], shape: tuple[int, int], dtype: torch.dtype, rest: int, biased: bool
) -> None:
    """Groups may be empty, rows may belong to no group, and rows may have any number of bytes."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    x = torch.randn(ends[-1] + rest, shape[1], generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(len(sizes), *shape, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(len(sizes), shape[0], generator=generator, dtype=torch.float64).to(dtype) if biased else None
    parameters = [tensor for tensor in (x, weight, bias) if tensor is not None]
    copies = [tensor.clone().requires_grad_() for tensor in parameters]
    given_bias = copies[2] if biased else None
    found = grouped_linear(copies[0], copies[1], torch.tensor(ends, dtype=torch.int32), given_bias)
    assert found.shape == (len(x), shape[0])
    assert found.dtype == dtype
    for parameter in parameters:
        parameter.requires_grad_()
    expected = products(x, weight, ends, bias)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(found[: ends[-1]], expected, rtol=tolerance, atol=tolerance)
    assert not found[ends[-1] :].any()
    target = torch.randn(expected.shape, generator=generator).to(dtype)
    (found[: ends[-1]] * target).sum().backward()
    (expected * target).sum().backward()
    for given_, parameter in zip(copies, parameters, strict=True):
        torch.testing.assert_close(given_.grad, parameter.grad, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("biased", [False, True])
def test_kernel_for_all_groups_computes_the_same(monkeypatch: pytest.MonkeyPatch, biased: bool) -> None:
    """PyTorch has a slow version of its kernel for CPUs. Its products are rounded before the bias is added."""
    ends, results = torch.tensor([3, 3, 7, 9], dtype=torch.int32), []
    for kernel in (False, True):
        monkeypatch.setattr(grouped_linear_module, "_has_grouped_kernel", lambda *_, kernel=kernel: kernel)
        generator = torch.Generator().manual_seed(1)
        x, weight, bias = (
            torch.randn(shape, generator=generator).bfloat16().requires_grad_()
            for shape in ((12, 16), (4, 24, 16), (4, 24))
        )
        out = grouped_linear(x, weight, ends, bias if biased else None)
        (out * torch.arange(24)).sum().backward()
        results.append([out, x.grad, weight.grad, *([bias.grad] if biased else [])])
        assert not out[9:].any()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("width", [8, 10])
def test_autocast_casts_to_bfloat16(width: int) -> None:
    x, weight, ends = torch.randn(6, width), torch.randn(2, 8, width), torch.tensor([2, 6], dtype=torch.int32)
    bias = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = grouped_linear(x, weight, ends, bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, grouped_linear(x.bfloat16(), weight.bfloat16(), ends, bias.bfloat16()))
