"""softmax(Q K^T / sqrt(d)) V with a causal mask, by the fastest way there is for the device."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

LONGEST_BY_HAND = 512
"""Windows up to which the backward below is faster than PyTorch's on a CPU in bfloat16: three times and more at 64
and 128 tokens, up to twice at 256, 1.3 times at 512 (``experiments/benchmarks/attention.py``)."""


@cache
def _compiled_flex_attention() -> Any:
    """Uncompiled it would hold every score in memory. Made when it is needed: the compiler takes seconds to import."""
    return torch.compile(flex_attention)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | BlockMask | None = None
) -> Tensor:
    """Attend to the past.

    Args:
        q: (B, n_head, T, head_dim).
        k: (B, n_kv_head, T, head_dim).
        v: (B, n_kv_head, T, head_dim).
        dropout: Probability of zeroing an attention weight.
        mask: What of the past: (B, 1, T, T) bool, or the blocks of FlexAttention (which drops nothing); by default all.

    Returns:
        (B, n_head, T, head_dim).
    """
    group = q.size(1) // k.size(1)
    if isinstance(mask, BlockMask):
        flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        found: Tensor = flex(q, k, v, block_mask=mask, enable_gqa=group > 1)
        return found
    by_hand = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.size(2) <= LONGEST_BY_HAND and not dropout
    if by_hand and torch.is_grad_enabled():
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, n_head, T, head_dim)
        bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        out: Tensor = _attend(q, k, v, bias)[0]
        return out
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=group > 1
    )


# PyTorch's fused backward for CPUs works in tiles that are tiny in bfloat16, and spends its time around the
# products. Whole matrices, batched over heads, keep the processor's matrix unit busy. As operators of their own,
# because the compiler's code for the same lines is slower than PyTorch's kernels.


@torch.library.custom_op("lit_gpt_scratch::causal_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values, and for every query the logarithm of its softmax's denominator: (B, n_head, T) float32.

    The bias is 0 for what a query may see and minus infinity for the rest, (B, 1, T, T); None lets it see all its past.
    """
    out, log_denominator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=bias is None, attn_mask=bias
    )
    return out.contiguous(), log_denominator.contiguous()


@torch.library.custom_op("lit_gpt_scratch::causal_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, log_denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients as in FlashAttention's appendix (https://arxiv.org/abs/2205.14135, B.2), weights recomputed.

    What is subtracted from a product is there before it, for ``baddbmm_`` to add to: then the difference is rounded
    to bfloat16, and not the product. A score of 40 alone would be off by 0.1, and its weight by a tenth. In place,
    because at these sizes asking for memory takes as long as a product.
    """
    B, H, T, D = q.shape
    grad, q, k, v, out = (x.reshape(B * H, T, D) for x in (grad, q, k, v, out))
    if bias is None:
        bias = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = (bias - log_denominator.to(q.dtype).unsqueeze(-1)).view(B * H, T, T)
    weights = scores.baddbmm_(q, k.mT, alpha=D**-0.5).softmax(-1)  # again, for what the denominator was rounded by
    mean = (grad.float() * out.float()).sum(-1, keepdim=True).to(q.dtype)  # (B * H, T, 1), of the weights' gradient
    d_scores = (-mean.expand(-1, -1, T)).baddbmm_(grad, v.mT).mul_(weights)  # (B * H, T, T)
    d_q = torch.bmm(d_scores, k).mul_(D**-0.5)
    d_k = torch.bmm(d_scores.mT, q).mul_(D**-0.5)
    d_v = torch.bmm(weights.mT, grad)
    return d_q.view(B, H, T, D), d_k.view(B, H, T, D), d_v.view(B, H, T, D)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, log_denominator: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _remember(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs, *output)  # type: ignore[arg-type]  # it saves None as well


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None]:
    return (*_attend_backward(grad, *ctx.saved_tensors), None)  # type: ignore[attr-defined]


_attend.register_autograd(_differentiate, setup_context=_remember)
