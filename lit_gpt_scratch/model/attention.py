"""Causal self-attention: multi-head, grouped-query and multi-query in one class."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from torch.utils._triton import has_triton

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.kernels.onednn_linear import Linear
from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.kv_cache import KVCache
from lit_gpt_scratch.model.norms import RMSNorm
from lit_gpt_scratch.model.positions import PositionEncoding

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig
    from lit_gpt_scratch.model.kv_cache import KVCache

FLEX_MIN_HEAD_DIM: Final = 16
"""Channels of a head that FlexAttention's kernels need."""


class AttentionLayout(NamedTuple):
    """What the parts of the model need to know of the order of the tokens.

    Attributes:
        positions: Of each token in its document, from 0, int64: (T,) where all rows are alike, else (B, T).
        rotation: What the position scheme's ``rotate`` wants to know of them.
        mask: What attention may see; None is the token itself and all before it. Dense it is (1 or B, 1, T, S) bool, or
            (1 or B, 1 or n_head, T, S) float, which is added to the scores; or it is the blocks of FlexAttention.
    """

    positions: Tensor
    rotation: tuple[Tensor, Tensor] | None
    mask: Tensor | BlockMask | None


def can_use_flex_attention(config: "GPTConfig", device: torch.device) -> bool:
    """Whether FlexAttention can train there: it drops no weights, has no backward on a CPU, and needs Triton."""
    return device.type == "cuda" and config.head_width >= FLEX_MIN_HEAD_DIM and not config.dropout and has_triton()


def validate_attention_backend(config: "GPTConfig", device: torch.device) -> None:
    """Refuse attention that cannot be trained on a device.

    Raises:
        UserError: It was asked for, and cannot.
    """
    if config.attention_backend == "flex" and not can_use_flex_attention(config, device):
        raise UserError(
            f"model.gpt.attention_backend is flex, but FlexAttention cannot train on {device.type} with heads of "
            f"{config.head_width} channels (it needs a GPU, and {FLEX_MIN_HEAD_DIM}); choose auto, sdpa or manual"
        )


def build_attention_layout(
    config: "GPTConfig",
    position: PositionEncoding,
    input_ids: Tensor,
    document_ids: Tensor | None,
    cache: "KVCache | None",
) -> AttentionLayout:
    """Work it out.

    Args:
        config: The architecture.
        position: The scheme.
        input_ids: (B, T) int64.
        document_ids: (B, T) int64, another number for each document of a row; its tokens stand side by side.
        cache: What came before, if anything did; it is ready for the tokens.
    """
    T, device = input_ids.size(1), input_ids.device
    place = torch.arange(T, device=device)
    if cache is not None:
        positions, needs_mask, S = cache.positions, cache.needs_mask, cache.visible_length
    else:
        positions = place if document_ids is None else document_positions(document_ids, place)
        needs_mask, S = document_ids is not None, T
    rotation = position.cos_sin(positions)
    window = config.sliding_window if config.sliding_window is not None and config.sliding_window < S else None
    blocks = config.attention_backend == "flex" or (
        config.attention_backend == "auto"
        and can_use_flex_attention(config, device)
        and (needs_mask or window is not None or config.attention_softcap is not None or position.has_score_bias)
    )
    if blocks and cache is None:
        return AttentionLayout(positions, rotation, _build_block_mask(input_ids, document_ids, window))
    if not (needs_mask or window is not None or position.has_score_bias):
        return AttentionLayout(positions, rotation, None)
    query = positions if cache is not None else place  # (T,) or (B, T)
    distance = query[..., None] - torch.arange(S, device=device)  # (T, S) or (B, T, S)
    distance = distance.view(-1, 1, T, S)  # (1 or B, 1, T, S)
    visible = distance >= 0
    if document_ids is not None:
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if window is not None:
        visible = visible & (distance < window)
    if not position.has_score_bias:
        return AttentionLayout(positions, rotation, visible)
    heads = torch.arange(config.n_head, device=device).view(1, -1, 1, 1)
    bias = position.score_bias(heads, distance)  # (1 or B, n_head, T, S)
    return AttentionLayout(positions, rotation, bias.masked_fill(~visible, float("-inf")))


def document_positions(document_ids: Tensor, place: Tensor) -> Tensor:
    """How far each token stands from the first of its document: (B, T)."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return place - torch.where(begins, place, 0).cummax(dim=1).values


def _build_block_mask(input_ids: Tensor, document_ids: Tensor | None, window: int | None) -> BlockMask:
    B, T = input_ids.shape

    def visible(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if document_ids is not None:
            seen = seen & (document_ids[b, query] == document_ids[b, key])
        return seen

    rows = None if document_ids is None else B
    return create_block_mask(visible, rows, None, T, T, device=input_ids.device, _compile=input_ids.is_cuda)


MAX_LENGTH = 512
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
        mask: As in ``BatchLayout``; by default all of the past. The blocks of FlexAttention drop nothing.
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
    by_hand = q.device.type == "cpu" and q.dtype == torch.bfloat16 and S <= MAX_LENGTH and not dropout
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


class Attention(nn.Module):
    r"""Every token looks back at itself and the tokens before it.

    Heads share keys and values in groups of ``n_head / n_kv_head``::

        n_head = 4    n_kv_head = 4       n_kv_head = 2       n_kv_head = 1
        queries       q  q  q  q          q  q  q  q          q  q  q  q
                      |  |  |  |          \  /  \  /           \  \  /  /
        keys, values  kv kv kv kv          kv    kv                kv
                      multi-head          grouped-query       multi-query

    A class of one's own inherits from this one, overrides ``attend`` or whatever it wants another way, and is named
    by ``model.gpt.attention``.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.n_head = config.n_head
        self.n_kv_head = config.kv_heads
        self.head_dim = config.head_width
        self.query = Linear(config.n_embd, self.n_head * self.head_dim, bias=config.bias)
        self.key = Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=config.bias)
        self.value = Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=config.bias)
        self.output = Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.weights: list[Tensor] | None = None
        """Where to put the attention weights of each call, (B, n_head, T, S); None for nowhere."""

    def forward(
        self,
        x: Tensor,
        position: PositionEncoding,
        layout: AttentionLayout,
        value_embedding: Tensor | None = None,
        remember: tuple[KVCache, int] | None = None,
    ) -> Tensor:
        """x: (B, T, n_embd) -> (B, T, n_embd); the others as in ``Block.forward``."""
        B, T, _ = x.shape  # -1 below is the number of heads, of which a tensor-parallel process has its share
        q = self.query(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.key(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        v = self.value(x)
        if value_embedding is not None:
            v = v + value_embedding.type_as(v)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        q = position.rotate(self.query_norm(q), layout.rotation)
        k = position.rotate(self.key_norm(k), layout.rotation)
        if remember is not None:
            cache, number = remember
            k, v = cache.append(number, k, v)  # (B, n_kv_head, S, head_dim)
        y = self.attend(q, k, v, position, layout)  # (B, n_head, T, head_dim)
        y = y.transpose(1, 2).flatten(2)  # (B, T, n_head * head_dim)
        out: Tensor = self.output(y)  # (B, T, n_embd)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: PositionEncoding, layout: AttentionLayout) -> Tensor:
        """q: (B, n_head, T, head_dim), k and v: (B, n_kv_head, S, head_dim) -> (B, n_head, T, head_dim)."""
        dropout = self.config.dropout if self.training else 0.0
        bias = position.score_bias if position.has_score_bias else None
        given = q, k, v, dropout, layout.mask, self.config.attention_softcap, bias
        if self.weights is not None:
            y, weights = manual_attention(*given)
            self.weights.append(weights)
            return y
        return causal_attention(*given, self.config.attention_backend)


def resolve_attention_class(path: str | None) -> type[Attention]:
    """The class that ``model.gpt.attention`` names. Importing it runs the file that it is in.

    Raises:
        UserError: There is none, or it is no ``Attention``.
    """
    if path is None:
        return Attention
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"model.gpt.attention is {path}, which cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Attention)):
        raise UserError(f"model.gpt.attention is {path}, which does not inherit from {Attention.__module__}.Attention")
    return found
