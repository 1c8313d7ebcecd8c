"""x W^T + b, by the library that multiplies fastest on the processor.

On x86 processors PyTorch multiplies float32 matrices by Intel's MKL, which leaves half of an AMD processor idle where
that has AVX-512. oneDNN, which PyTorch brings along for bfloat16, does not (``experiments/benchmarks/linear.py``).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula
from typing_extensions import override


def onednn_is_faster() -> bool:
    """Whether this processor is of those for which that was measured: AMD's with AVX-512."""
    if not (torch._C.has_mkl and torch._C._has_mkldnn):
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch have none
    return str(known.get("cpu_name", "")).startswith("AMD") and torch.backends.cpu.get_cpu_capability() == "AVX512"


ONEDNN = onednn_is_faster()
"""Whether products go to oneDNN, from this size on:"""
FEWEST = 2**22
"""Multiplications of a product from which a call of oneDNN, which takes longer to begin, pays."""
PLAIN = Tensor, nn.Parameter
"""Types of tensors. Subclasses, such as a tensor-parallel process's share, say themselves how they are multiplied."""


class Linear(nn.Linear):
    """``nn.Linear``, by ``linear``."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


LINEAR = nn.Linear, Linear
"""Layers that do nothing else."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, which oneDNN computes where it is faster.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N).
    """
    if not (
        ONEDNN
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * weight.size(0) >= FEWEST
        and x.ndim > 1
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()  # they know no rule for it
    ):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.contiguous(), weight, bias)  # type: ignore[no-untyped-call]  # torch's own
    return out


# An operator, so that the compiler takes it as a whole and tools know it by its name.
torch.library.define("lit_gpt_scratch::product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor")


@torch.library.impl("lit_gpt_scratch::product", "cpu")
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a: (..., K), b: (N, K), bias: (N,) -> (..., N)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return out


@torch.library.register_fake("lit_gpt_scratch::product")  # type: ignore[untyped-decorator]  # torch's own
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.size(0)))


@register_flop_formula(torch.ops.lit_gpt_scratch.product)
def _(a: torch.Size, b: torch.Size, bias: torch.Size | None, out_shape: torch.Size) -> int:
    return 2 * a.numel() * b[0]


class _Linear(torch.autograd.Function):
    """The gradients are products of the same kind: dX = dY W, dW = dY^T X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # What is frozen needs nothing kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        flat = grad.flatten(0, -2)  # (B * T, N)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = _multiply(grad, weight.t())
        if ctx.needs_input_grad[1]:
            # oneDNN lays its second factor out anew, in which it is good: the larger one is that.
            read = x.flatten(0, -2)  # (B * T, K)
            wide = flat.size(1) > read.size(1)
            d_weight = _multiply(read.t(), flat.t()).t() if wide else _multiply(flat.t(), read.t())
        if ctx.needs_input_grad[2]:
            d_bias = flat.sum(0)
        return d_x, d_weight, d_bias


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``product``, remembered where gradients of gradients are wanted."""
    if torch.is_grad_enabled():
        out: Tensor = _Linear.apply(a, b, bias)  # type: ignore[no-untyped-call]  # torch's own
        return out
    return torch.ops.lit_gpt_scratch.product(a, b, bias)  # type: ignore[no-any-return]
