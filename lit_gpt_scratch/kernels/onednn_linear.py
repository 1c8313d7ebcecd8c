"""Linear layers computed by oneDNN, on CPUs where it is faster than PyTorch's default.

On x86, PyTorch multiplies float32 matrices with Intel's MKL. On AMD's Zen 5, MKL reaches half the speed of oneDNN, the
library that PyTorch ships for bfloat16 (``experiments/benchmarks/linear.py``). PyTorch's own switch,
``torch.set_float32_matmul_precision("medium")``, also allows bfloat16 products on processors that support them, and is
slow in small networks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula
from typing_extensions import override


def onednn_is_faster() -> bool:
    """Whether oneDNN is known to be faster on this processor; measured on AMD's Zen 5."""
    if not (torch._C.has_mkl and torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions of torch
    zen_5 = str(known.get("cpu_name", "")).startswith("AMD") and known.get("avx512_vp2intersect", False)
    return bool(zen_5) and torch.backends.cpu.get_cpu_capability() == "AVX512"


USE_ONEDNN = onednn_is_faster()
"""Whether large products are computed by oneDNN."""
MIN_MULTIPLICATIONS = 2**22
"""Minimum number of multiplications for which oneDNN is faster, because it has a higher overhead per call."""
PLAIN_TENSORS = Tensor, nn.Parameter
"""Exact tensor classes that oneDNN is used for; other subclasses, such as ``DTensor``, define their own products."""


class Linear(nn.Linear):
    """``nn.Linear`` that uses the function ``linear``."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer, input: (..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


LINEAR_CLASSES = nn.Linear, Linear
"""Exact classes of plain linear layers, which LoRA may replace."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``torch.nn.functional.linear``, with oneDNN where that is faster.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N).
    """
    if not _suits_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]  # torch's own
    return out


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = (x, weight) if bias is None else (x, weight, bias)
    return (
        USE_ONEDNN
        and not torch.compiler.is_exporting()  # an exported program may run on another machine
        and x.numel() * weight.size(0) >= MIN_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
        and all(t.dtype == torch.float32 and t.device.type == "cpu" and type(t) in PLAIN_TENSORS for t in given)
        # Leave mismatched shapes to torch's own errors.
        and (x.ndim > 1 and weight.shape == (weight.size(0), x.size(-1)))
        and (bias is None or bias.shape == weight.shape[:1])
        # Respect torch.backends.mkldnn.flags(enabled=False); the compiler cannot trace this call.
        and (torch.compiler.is_compiling() or torch._C._get_mkldnn_enabled())
        # Leave forward-mode and functorch derivatives to torch.
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


# A custom operator, so that the compiler treats it as opaque and profilers show its name.
torch.library.define("lit_gpt_scratch::product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor")


@torch.library.impl("lit_gpt_scratch::product", "cpu")
def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a b^T + bias; a: (..., K), b: (N, K), bias: (N,) -> (..., N)."""
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores the strides of the bias
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, _contiguous_or_transposed(b), bias, "none", [], "")
    return out


def _contiguous_or_transposed(b: Tensor) -> Tensor:
    """Return a matrix with strides that oneDNN handles efficiently, copying it if necessary.

    With strides other than contiguous or transposed, oneDNN is a thousand times slower.
    """
    return b if b.is_contiguous() or b.t().is_contiguous() else b.contiguous()


@torch.library.register_fake("lit_gpt_scratch::product")  # type: ignore[untyped-decorator]  # torch's own
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.size(0)))


@register_flop_formula(torch.ops.lit_gpt_scratch.product)
def _(a: torch.Size, b: torch.Size, bias: torch.Size | None, out_shape: torch.Size) -> int:
    return 2 * a.numel() * b[0]


class _Linear(torch.autograd.Function):
    """Y = X W^T + b; the gradients dX = dY W and dW = dY^T X are computed by oneDNN, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Save only the tensors that the gradients of trainable inputs need.
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
            # oneDNN starts by reordering its second factor, and is faster if that is the larger one.
            wide = flat.size(1) > x2d.size(1)
            d_weight = _multiply(x2d.t(), flat.t()).t() if wide else _multiply(flat.t(), x2d.t())
        if ctx.needs_input_grad[2]:
            d_bias = flat.sum(0)
        return d_x, d_weight, d_bias


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a b^T + bias, differentiably; a: (..., K), b: (N, K), bias: (N,) -> (..., N)."""
    if torch._C._are_functorch_transforms_active():  # such as vmap over gradients
        return F.linear(a, b, bias)
    if torch.is_grad_enabled():  # for second derivatives
        out: Tensor = _Linear.apply(a, b, bias)  # type: ignore[no-untyped-call]  # torch's own
        return out
    return torch.ops.lit_gpt_scratch.product(a, b, bias)  # type: ignore[no-any-return]
