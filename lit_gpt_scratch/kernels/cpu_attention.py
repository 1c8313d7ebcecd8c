"""Causal attention in bfloat16 on CPUs, with a faster backward pass than PyTorch's fused kernel.

In bfloat16, PyTorch's fused backward pass uses very small tiles and spends most of its time outside matmuls.
The backward pass in this module multiplies entire (T, T) matrices, batched over heads, which makes better use of the
processor's matrix unit. The forward pass uses PyTorch's kernel.

Both passes are custom operators, because compiling the same code with Inductor would be slower than PyTorch's kernels.
"""

from typing import Final

import torch
from torch import Tensor

MAX_LENGTH: Final = 512
"""Maximum sequence length for which this backward pass is faster than PyTorch's.

The backward pass is at least 3 times as fast at 64 and 128 tokens, up to twice as fast at 256 tokens, and 1.3 times as
fast at 512 tokens (``experiments/benchmarks/attention.py``).
"""


def cpu_attention_is_faster(q: Tensor, k: Tensor, dropout: float = 0.0) -> bool:
    """Return whether ``cpu_attention`` is faster than PyTorch's kernel for the given arguments.

    This is the case for self-attention on short sequences in bfloat16 on a CPU, with gradients and without dropout.
    """
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and q.size(2) == k.size(2) <= MAX_LENGTH
        and not dropout
        and torch.is_grad_enabled()
    )


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute scaled dot-product attention in bfloat16 on a CPU.

    Equivalent to ``F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)``.

    Args:
        q: Queries, bfloat16 tensor of shape (B, n_head, T, head_dim).
        k: Keys, bfloat16 tensor of shape (B, n_kv_head, T, head_dim).
        v: Values, bfloat16 tensor of shape (B, n_kv_head, T, head_dim).
        mask: Attention mask of shape (1 or B, 1 or n_head, T, T), either bool (True where attention is allowed) or
            bfloat16 (added to the scores). None means a causal mask.

    Returns:
        The output, bfloat16 tensor of shape (B, n_head, T, head_dim).
    """
    group = q.size(1) // k.size(1)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, n_head, T, head_dim)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    out: Tensor = attention_forward(q, k, v, mask)[0]
    return out


@torch.library.custom_op("lit_gpt_scratch::causal_attention", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute attention with PyTorch's fused kernel.

    Args:
        q: Queries, of shape (B, n_head, T, head_dim).
        k: Keys, with the same shape as the queries.
        v: Values, with the same shape as the queries.
        bias: Bias to add to the scores, of shape (1 or B, 1 or n_head, T, T), with -inf at masked positions; None
            means a causal mask.

    Returns:
        The output, of shape (B, n_head, T, head_dim), and the log-sum-exp of each query's scores, float32 tensor of
        shape (B, n_head, T).
    """
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=bias is None, attn_mask=bias
    )
    return out.contiguous(), logsumexp.contiguous()


@torch.library.custom_op("lit_gpt_scratch::causal_attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of attention as in FlashAttention (https://arxiv.org/abs/2205.14135, appendix B.2).

    The attention weights are recomputed. Where a term is subtracted from a matrix product, ``baddbmm_`` adds the
    product to the negated term, so that only the difference is rounded to bfloat16. If the product were rounded first,
    a score of 40 could change by 0.1, and thus its attention weight by 10%. The operations are in-place, because at
    these sizes, an allocation takes as long as a matmul.
    """
    B, H, T, D = q.shape
    grad, q, k, v, out = (x.reshape(B * H, T, D) for x in (grad, q, k, v, out))
    if bias is None:
        bias = torch.full((T, T), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = (bias - logsumexp.to(q.dtype).unsqueeze(-1)).view(B * H, T, T)
    weights = scores.baddbmm_(q, k.mT, alpha=D**-0.5).softmax(-1)  # not exp: logsumexp was rounded to bfloat16
    mean = (grad.float() * out.float()).sum(-1, keepdim=True).to(q.dtype)  # (B * H, T, 1), mean gradient of the weights
    d_scores = (-mean.expand(-1, -1, T)).baddbmm_(grad, v.mT).mul_(weights)  # (B * H, T, T)
    d_q = torch.bmm(d_scores, k).mul_(D**-0.5)
    d_k = torch.bmm(d_scores.mT, q).mul_(D**-0.5)
    d_v = torch.bmm(weights.mT, grad)
    return d_q.view(B, H, T, D), d_k.view(B, H, T, D), d_v.view(B, H, T, D)


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs, *output)  # type: ignore[arg-type]  # it accepts None


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, None]:
    return (*attention_backward(grad, *ctx.saved_tensors), None)  # type: ignore[attr-defined]


attention_forward.register_autograd(_backward, setup_context=_setup_context)
