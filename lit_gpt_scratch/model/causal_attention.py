"""softmax(Q K^T / sqrt(d)) V with a causal mask: by the fastest way there is for the device, or step by step."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

LONGEST_BY_HAND = 512
"""Windows up to which the backward below is faster than PyTorch's on a CPU in bfloat16: three times and more at 64
and 128 tokens, up to twice at 256, 1.3 times at 512 (``experiments/benchmarks/attention.py``)."""


@cache
def _compiled_flex_attention() -> Any:
    """Uncompiled it would hold every score in memory. Made when it is needed: the compiler takes seconds to import."""
    return torch.compile(flex_attention)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    mask: Tensor | BlockMask | None = None,
    softcap: float | None = None,
    bias: Callable[[Tensor, Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend to the past.

    Args:
        q: (B, n_head, T, head_dim).
        k: (B, n_kv_head, S, head_dim); without a mask, S is T, or T is 1.
        v: (B, n_kv_head, S, head_dim).
        dropout: Probability of zeroing an attention weight.
        mask: As in ``Layout``; by default all of the past. The blocks of FlexAttention drop nothing.
        softcap: Squash the scores by ``softcap * tanh(scores / softcap)``.
        bias: What blocks add to a score, by head and distance; a dense mask has it in it.
        backend: ``auto``, or the way to do it: ``sdpa``, ``manual`` or ``flex``.

    Returns:
        (B, n_head, T, head_dim).
    """
    if isinstance(mask, BlockMask):
        return _flex_attention(q, k, v, mask, softcap, bias)
    # A single token's products are loops to a compiler, which fuses them with the mask and the softmax.
    alone = q.size(2) == 1 and mask is not None and torch.compiler.is_compiling()
    if backend == "manual" or softcap is not None or alone:
        return manual_attention(q, k, v, dropout, mask, softcap)[0]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    T, S, group = q.size(2), k.size(2), q.size(1) // k.size(1)
    by_hand = q.device.type == "cpu" and q.dtype == torch.bfloat16 and S <= LONGEST_BY_HAND and not dropout
    if by_hand and T == S and torch.is_grad_enabled():
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, n_head, T, head_dim)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        out: Tensor = _attend(q, k, v, mask)[0]
        return out
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, dropout_p=dropout, enable_gqa=group > 1
    )


def manual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    mask: Tensor | BlockMask | None = None,
    softcap: float | None = None,
    bias: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The textbook's softmax, step by step; arguments as for ``causal_attention``.

    Returns:
        (B, n_head, T, head_dim), and the weights before dropout, (B, n_head, T, S) in at least float32.
    """
    B, H, T, D = q.shape
    K, S = k.size(1), k.size(2)
    q = q.reshape(B, K, H // K, T, D)  # queries beside the key that they share
    scores = q @ k[:, :, None].mT * D**-0.5  # (B, n_kv_head, group, T, S)
    scores = scores.view(B, H, T, S).to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    elif isinstance(mask, BlockMask):
        mask = create_mask(mask.mask_mod, B, H, T, S, device=str(q.device))  # (B, n_head, T, S)
        if bias is not None:
            distance = torch.arange(T, device=q.device)[:, None] - torch.arange(S, device=q.device)
            scores = scores + bias(torch.arange(H, device=q.device)[:, None, None], distance)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1)
    dropped = F.dropout(weights, dropout).to(v.dtype).view(B, K, H // K, T, S)
    return (dropped @ v[:, :, None]).view(B, H, T, D), weights


def _flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    softcap: float | None,
    bias: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:
    def score(scores: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return scores if bias is None else scores + bias(head, query - key)

    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    out: Tensor = flex(
        q,
        k,
        v,
        score_mod=None if softcap is None and bias is None else score,
        block_mask=mask,
        enable_gqa=q.size(1) > k.size(1),
    )
    return out


# PyTorch's fused backward for CPUs works in tiles that are tiny in bfloat16, and spends its time around the
# products. Whole matrices, batched over heads, keep the processor's matrix unit busy. As operators of their own,
# because the compiler's code for the same lines is slower than PyTorch's kernels.


@torch.library.custom_op("lit_gpt_scratch::causal_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values, and for every query the logarithm of its softmax's denominator: (B, n_head, T) float32.

    The bias is added to the scores, minus infinity for what a query may not see, (1 or B, 1 or n_head, T, T); None lets
    it see all its past.
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
