"""Linear layers that use oneDNN on CPUs where it is faster than PyTorch's default library.

On x86, PyTorch multiplies float32 matrices with Intel MKL. On AMD Zen 5, MKL is only half as fast as oneDNN, which
PyTorch uses for bfloat16 (``experiments/benchmarks/linear.py``). PyTorch's own setting for oneDNN,
``torch.set_float32_matmul_precision("medium")``, also allows bfloat16 matmuls on processors that support them, and is
slow for small networks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula
from typing_extensions import override


def onednn_is_faster() -> bool:
    """Return whether oneDNN is known to be faster on this processor (only measured on AMD Zen 5)."""
    if not (torch._C.has_mkl and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions of torch
    zen_5 = str(known.get("cpu_name", "")).startswith("AMD") and known.get("avx512_vp2intersect", False)
    return bool(zen_5) and torch.backends.cpu.get_cpu_capability() == "AVX512"


USE_ONEDNN = onednn_is_faster()
"""Whether oneDNN is used for large matrix multiplications."""
MIN_MULTIPLICATIONS = 2**22
"""Minimum number of scalar multiplications in a matmul for which oneDNN is used.

Smaller matmuls do not amortize oneDNN's higher overhead per call.
"""
PLAIN_TENSORS = Tensor, nn.Parameter
"""Tensor classes for which oneDNN is used; subclasses such as ``DTensor`` are excluded."""


class OneDNNLinear(nn.Linear):
    """``nn.Linear`` that uses oneDNN for large matrix multiplications; see the function ``linear``."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Map an input of shape (..., in_features) to an output of shape (..., out_features)."""
        return linear(input, self.weight, self.bias)


Linear: type[nn.Linear] = OneDNNLinear if USE_ONEDNN else nn.Linear
"""Class of the linear layers of a network."""
LINEAR_CLASSES = nn.Linear, OneDNNLinear
"""Classes of linear layers that LoRA may replace; other subclasses of ``nn.Linear`` are excluded."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``torch.nn.functional.linear``, using oneDNN where it is faster.

    Args:
        x: Input, of shape (..., K).
        weight: Weight, of shape (N, K).
        bias: Bias, of shape (N,), or None.

    Returns:
        The output, of shape (..., N).
    """
    if not _suits_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]  # untyped in torch
    return out


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        USE_ONEDNN
        and not torch.compiler.is_exporting()  # an exported program may run on another machine
        and x.numel() * weight.size(0) >= MIN_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
        and all(t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in PLAIN_TENSORS for t in given)
        # For mismatched shapes, let torch raise its own errors.
        and (x.ndim > 1 and weight.shape == (weight.size(0), x.size(-1)))
        and (bias is None or bias.shape == weight.shape[:1])
        # Respect torch.backends.mkldnn.flags(enabled=False); the compiler cannot trace this call.
        and (torch.compiler.is_compiling() or torch._C._get_mkldnn_enabled())
        # Forward-mode and functorch derivatives are not supported.
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


# A custom operator, so that the compiler treats it as opaque and profilers show its name.
torch.library.define("lit_gpt_scratch::product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor")


@torch.library.impl("lit_gpt_scratch::product", "cpu")
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a b^T + bias with oneDNN; a: (..., K), b: (N, K), bias: (N,) -> (..., N)."""
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores the strides of the bias
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, _contiguous_or_transposed(b), bias, "none", [], "")
    return out


def _contiguous_or_transposed(b: Tensor) -> Tensor:
    """Return the matrix with strides that oneDNN supports efficiently, copying the matrix if necessary.

    If neither the matrix nor its transpose is contiguous, oneDNN is a thousand times slower.
    """
    return b if b.is_contiguous() or b.t().is_contiguous() else b.contiguous()


@torch.library.register_fake("lit_gpt_scratch::product")  # type: ignore[untyped-decorator]  # untyped in torch
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.size(0)))


@register_flop_formula(torch.ops.lit_gpt_scratch.product)
def _(a: torch.Size, b: torch.Size, bias: torch.Size | None, out_shape: torch.Size) -> int:
    return 2 * a.numel() * b[0]


class _Linear(torch.autograd.Function):
    """Autograd function for Y = X W^T + b; the gradients dX = dY W and dW = dY^T X are also computed with oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Save only the tensors that are required for the gradients of trainable inputs.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.size(-1))  # (B * T, N)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = _multiply(grad, weight.t())
        if ctx.needs_input_grad[1]:
            x2d = x.reshape(-1, x.size(-1))  # (B * T, K)
            # oneDNN first reorders its second factor, and is faster if that is the larger factor.
            wide = flat.size(1) > x2d.size(1)
            d_weight = _multiply(x2d.t(), flat.t()).t() if wide else _multiply(flat.t(), x2d.t())
        if ctx.needs_input_grad[2]:
            d_bias = flat.sum(0)
        return d_x, d_weight, d_bias


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a b^T + bias with support for autograd; a: (..., K), b: (N, K), bias: (N,) -> (..., N)."""
    if torch._C._are_functorch_transforms_active():  # such as vmap over gradients
        return F.linear(a, b, bias)
    if torch.is_grad_enabled():  # for second derivatives
        out: Tensor = _Linear.apply(a, b, bias)  # type: ignore[no-untyped-call]  # untyped in torch
        return out
    return torch.ops.lit_gpt_scratch.product(a, b, bias)  # type: ignore[no-any-return]
