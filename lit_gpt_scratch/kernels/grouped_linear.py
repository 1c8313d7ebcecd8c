"""Linear layers with one weight and bias per group of rows, such as the experts of a mixture of experts.

Where PyTorch has a kernel for all groups (in bfloat16 on recent GPUs), it is used; elsewhere, each group is a matrix
product, which requires the sizes of the groups on the host. The operators are custom ones, because PyTorch cannot
compile its own in float32.
"""

from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

MIN_CAPABILITY: Final = (9, 0)
"""Compute capability of the GPUs for which all supported versions of PyTorch have a kernel for all groups."""
ALIGNMENT: Final = 16
"""Number of bytes of which it requires the rows of all matrices to be a multiple."""


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply consecutive groups of rows by one weight per group, and add one bias per group.

    Under autocast, float32 inputs are cast as in ``torch.nn.functional.linear``.

    Args:
        x: Rows, sorted by group, of shape (N, K).
        weight: One weight per group, of shape (G, M, K).
        ends: Index at which each group ends, nondecreasing int32 tensor of shape (G,). Rows from ``ends[-1]`` on belong
            to no group.
        bias: One bias per group, of shape (G, M), or None.

    Returns:
        ``x[n] @ weight[g].T + bias[g]`` for each row n of group g, of shape (N, M); 0 for rows of no group.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = grouped_product(x, weight, ends, bias)
    return out


@torch.library.custom_op("lit_gpt_scratch::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``grouped_linear`` without autocast."""
    if _has_grouped_kernel(x, weight.shape[1:]):
        out = F.grouped_mm(x, weight.mT, offs=ends)
        row = torch.arange(len(x), dtype=ends.dtype, device=x.device)
        if bias is not None:
            groups = torch.searchsorted(ends, row, right=True).clamp_(max=len(bias) - 1)  # (N,)
            out += bias[groups]
        return out.masked_fill_(row[:, None] >= ends[-1], 0)
    out = x.new_empty(len(x), weight.size(1))
    starts = [0, *ends.tolist()]
    for group, (start, end) in enumerate(pairwise(starts)):
        if bias is None:
            torch.mm(x[start:end], weight[group].T, out=out[start:end])
        else:
            torch.addmm(bias[group], x[start:end], weight[group].T, out=out[start:end])
    out[starts[-1] :] = 0
    return out


@torch.library.custom_op("lit_gpt_scratch::grouped_outer_product", mutates_args=())
def grouped_outer_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Compute ``a[rows].T @ b[rows]`` for the rows of each group; a: (N, M), b: (N, K) -> (G, M, K)."""
    if _has_grouped_kernel(a, (a.size(1), b.size(1))):
        out = F.grouped_mm(a.mT, b, offs=ends)
        is_empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        return out.masked_fill_(is_empty[:, None, None], 0)  # https://github.com/pytorch/pytorch/issues/172439
    out = a.new_empty(len(ends), a.size(1), b.size(1))
    starts = [0, *ends.tolist()]
    for product, start, end in zip(out, starts, starts[1:], strict=False):
        torch.mm(a[start:end].T, b[start:end], out=product)
    return out


def _has_grouped_kernel(x: Tensor, sizes: tuple[int, ...]) -> bool:
    if x.device.type != "cuda" or x.dtype != torch.bfloat16:
        return False
    is_aligned = all(size * x.element_size() % ALIGNMENT == 0 for size in sizes)
    return is_aligned and torch.cuda.get_device_capability(x.device) >= MIN_CAPABILITY


@grouped_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.size(0), weight.size(1))


@grouped_outer_product.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(ends.size(0), a.size(1), b.size(1))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
    x, weight, ends = ctx.saved_tensors
    grad, d_bias = grad.contiguous(), None
    d_x = grouped_product(grad, weight.mT, ends, None) if ctx.needs_input_grad[0] else None
    d_weight = grouped_outer_product(grad, x, ends) if ctx.needs_input_grad[1] else None
    if ctx.needs_input_grad[3]:  # the sum over the rows of each group
        ones = grad.new_ones(len(grad), ALIGNMENT // grad.element_size())
        d_bias = grouped_outer_product(grad, ones, ends)[..., 0]
    return d_x, d_weight, None, d_bias


grouped_product.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.lit_gpt_scratch.grouped_product)
def _(x: torch.Size, weight: torch.Size, ends: torch.Size, bias: torch.Size | None, out_shape: torch.Size) -> int:
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.lit_gpt_scratch.grouped_outer_product)
def _(a: torch.Size, b: torch.Size, ends: torch.Size, out_shape: torch.Size) -> int:
    return 2 * a[0] * a[1] * b[1]
