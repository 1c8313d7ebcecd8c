"""Causal self-attention: attention masks, attention backends and the module ``Attention``."""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, create_mask, flex_attention
from torch.utils._triton import has_triton

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.kernels.cpu_attention import cpu_attention, cpu_attention_is_faster
from lit_gpt_scratch.kernels.onednn_linear import Linear
from lit_gpt_scratch.model.kv_cache import KVCache
from lit_gpt_scratch.model.local_shard import to_local
from lit_gpt_scratch.model.module_metadata import linear_flops_per_token
from lit_gpt_scratch.model.norms import RMS_NORMS, RMSNorm
from lit_gpt_scratch.model.positions import PositionEncoding
from lit_gpt_scratch.model.weight_sampler import WeightSampler

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig

FLEX_MIN_HEAD_DIM: Final = 16
"""Smallest head dimension that FlexAttention's kernels support."""

ScoreBias = Callable[[Tensor, Tensor], Tensor]
"""Callable that maps head indices and query-key distances (both int64) to biases that are added to the attention
scores; see ``PositionEncoding.score_bias``."""


# Positions and mask


class AttentionLayout(NamedTuple):
    """Positions and attention mask of a batch, computed once for all local or all global blocks.

    Attributes:
        positions: Position of each token in its document, counted from 0, int64 tensor of shape (B, T), or (T,) if all
            rows have the same positions.
        cos_sin: The output of ``PositionEncoding.cos_sin`` for these positions.
        mask: The attention mask; None means a causal mask. A dense mask is either a bool tensor of shape
            (1 or B, 1, T, S) that is True where attention is allowed, or a float tensor of shape
            (1 or B, 1 or n_head, T, S) that is added to the scores. FlexAttention uses a ``BlockMask``.
        key_cos_sin: With a rolling ``KVCache``, the output of ``PositionEncoding.cos_sin`` for the positions of all
            keys in the cache, which are rotated after they are read. None if only the new keys are rotated.
    """

    positions: Tensor
    cos_sin: tuple[Tensor, Tensor] | None
    mask: Tensor | BlockMask | None
    key_cos_sin: tuple[Tensor, Tensor] | None = None


def build_attention_layouts(
    config: "GPTConfig",
    position: PositionEncoding,
    input_ids: Tensor,
    document_ids: Tensor | None,
    cache: KVCache | None,
) -> dict[bool, AttentionLayout]:
    """Compute the layouts of all blocks, keyed by ``GPTConfig.is_local``; see ``build_attention_layout``."""
    kinds = {config.is_local(layer) for layer in range(config.n_layer)}
    return {
        is_local: build_attention_layout(config, position, input_ids, document_ids, cache, is_local)
        for is_local in sorted(kinds)
    }


def build_attention_layout(
    config: "GPTConfig",
    position: PositionEncoding,
    input_ids: Tensor,
    document_ids: Tensor | None,
    cache: KVCache | None,
    is_local: bool = True,
) -> AttentionLayout:
    """Compute the positions and the attention mask of a batch for local or global blocks.

    Args:
        config: The architecture.
        position: The position encoding.
        input_ids: Token ids, int64 tensor of shape (B, T).
        document_ids: Id of the document that contains each token, int64 tensor of shape (B, T); ids are unique within a
            row. The tokens of a document are contiguous.
        cache: KV cache of the preceding tokens, after a call to its ``begin_forward``, or None if no cache is used.
        is_local: Whether the blocks attend only to the tokens in ``config.sliding_window``, if it is set.
    """
    T, device = input_ids.size(1), input_ids.device
    index = torch.arange(T, device=device)
    if cache is not None:
        positions, needs_mask, S = cache.positions, cache.needs_mask, cache.visible_length
        key_positions, lengths = cache.key_positions, cache.row_lengths  # (S,) or (B, S)
    else:
        key_positions, lengths = index, [T]
        positions = index if document_ids is None else document_positions(document_ids, index)
        needs_mask, S = document_ids is not None, T
    cos_sin = position.cos_sin(positions, lengths, is_local)
    key_cos_sin = position.cos_sin(key_positions, lengths, is_local) if cache is not None and cache.rolling else None
    window = config.sliding_window if is_local else None
    if window is not None and window >= S:
        window = None

    use_flex = config.attention_backend == "flex" or (
        config.attention_backend == "auto"
        and can_use_flex_attention(config, device)
        and (
            needs_mask
            or window is not None
            or config.attention_softcap is not None
            or config.attention_sinks
            or position.has_score_bias
        )
    )
    if use_flex and cache is None:
        return AttentionLayout(positions, cos_sin, _build_block_mask(input_ids, document_ids, window))
    if not (needs_mask or window is not None or position.has_score_bias):
        return AttentionLayout(positions, cos_sin, None, key_cos_sin)

    query = positions if cache is not None else index  # (T,) or (B, T)
    distance = query[..., None] - key_positions[..., None, :]  # (T, S) or (B, T, S)
    distance = distance.view(-1, 1, T, S)  # (1 or B, 1, T, S)
    visible = distance >= 0
    if document_ids is not None:
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if window is not None:
        visible = visible & (distance < window)
    if not position.has_score_bias:
        return AttentionLayout(positions, cos_sin, visible, key_cos_sin)
    heads = torch.arange(config.n_head, device=device).view(1, -1, 1, 1)
    bias = position.score_bias(heads, distance)  # (1 or B, n_head, T, S)
    return AttentionLayout(positions, cos_sin, bias.masked_fill(~visible, float("-inf")), key_cos_sin)


def document_positions(document_ids: Tensor, index: Tensor) -> Tensor:
    """Return the position of each token within its document.

    Args:
        document_ids: Id of the document that contains each token, int64 tensor of shape (B, T).
        index: Positions in the row, from 0 to T - 1, int64 tensor of shape (T,).

    Returns:
        Positions within the documents, counted from 0, int64 tensor of shape (B, T).
    """
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(is_first, index, 0).cummax(dim=1).values


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


# Backends


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    mask: Tensor | BlockMask | None = None,
    softcap: float | None = None,
    bias: ScoreBias | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute causal multi-head or grouped-query attention with the fastest backend that supports the arguments.

    Args:
        q: Queries, of shape (B, n_head, T, head_dim).
        k: Keys, of shape (B, n_kv_head, S, head_dim). If ``mask`` is None, S must equal T or T must be 1.
        v: Values, of shape (B, n_kv_head, S, head_dim).
        dropout: Dropout probability for attention weights; not supported with a ``BlockMask``.
        mask: Attention mask (see ``AttentionLayout``); None means a causal mask.
        softcap: Soft cap that bounds the scores to ``softcap * tanh(scores / softcap)``; None disables it.
        bias: Score bias, used only with a ``BlockMask``; a dense mask already includes it.
        sinks: Logit of each head's attention sink, of shape (n_head,); it is neither capped nor biased.
        backend: Attention backend: ``auto``, ``sdpa``, ``manual`` or ``flex``.

    Returns:
        The output, of shape (B, n_head, T, head_dim).
    """
    if isinstance(mask, BlockMask):
        return _flex_attention(q, k, v, mask, softcap, bias, sinks)
    # For a single query, Inductor turns the matmuls into loops and fuses them with the mask and the softmax, and
    # inserting sinks, which copies all keys and values, would take longer than attention itself.
    fuses = mask is not None and torch.compiler.is_compiling()
    manual_is_faster = q.size(2) == 1 and (fuses or sinks is not None)
    if backend == "manual" or softcap is not None or manual_is_faster:
        return manual_attention(q, k, v, dropout, mask, softcap, sinks=sinks)[0]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    if sinks is None and cpu_attention_is_faster(q, k, dropout):
        return cpu_attention(q, k, v, mask)
    head_dim, scale = q.size(-1), None
    if sinks is not None:
        q, k, v, mask = _insert_sinks(q, k, v, mask, sinks)
        scale = head_dim**-0.5
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and q.size(2) > 1,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.size(1) > k.size(1),
    )
    return out if sinks is None else out[:, :, 1:, :head_dim]


def _insert_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Insert a first token with a value of zero to which each query of a head has the score ``sinks[head]``.

    An additional channel of the queries holds the logits of the sinks, and is multiplied by one in the inserted key and
    by zero in all other keys. The inserted token has a query, too, so that the mask remains causal. Fused kernels then
    apply, with gradients for the sinks. Multiplying the output by ``sigmoid(logsumexp - sink)`` instead, as with
    FlexAttention, requires the gradient of the logsumexp, which the kernels of ``scaled_dot_product_attention`` do not
    have.

    Returns:
        Queries of shape (B, n_head, 1 + T, head_dim + 1), keys and values of shape (B, n_kv_head, 1 + S, head_dim + 1),
        and the mask, whose last two dimensions are 1 + T and 1 + S.
    """
    B, H, T, D = q.shape
    logits = (sinks * D**0.5).to(q.dtype).view(1, H, 1, 1).expand(B, H, T, 1)
    q = F.pad(torch.cat((q, logits), dim=-1), (0, 0, 1, 0))
    sink_key = F.pad(k.new_ones(B, k.size(1), 1, 1), (D, 0))  # (B, n_kv_head, 1, head_dim + 1)
    k = torch.cat((sink_key, F.pad(k, (0, 1))), dim=2)
    v = F.pad(v, (0, 1, 1, 0))
    if mask is not None:
        mask = F.pad(mask, (1, 0, 1, 0), value=True if mask.dtype == torch.bool else 0.0)
    return q, k, v, mask


def manual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    mask: Tensor | BlockMask | None = None,
    softcap: float | None = None,
    bias: ScoreBias | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step: scores, mask, softmax, weighted sum.

    The arguments are those of ``causal_attention``.

    Returns:
        The output, of shape (B, n_head, T, head_dim), and the attention weights before dropout, of shape
        (B, n_head, T, S), in at least float32; without those of the sinks.
    """
    B, H, T, D = q.shape
    K, S = k.size(1), k.size(2)
    q = q.reshape(B, K, H // K, T, D)  # (B, n_kv_head, group, T, head_dim): query heads grouped by shared key head
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
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        logits = sinks.to(scores.dtype).view(H, 1, 1).expand(B, H, T, 1)
        weights = torch.cat((scores, logits), dim=-1).softmax(-1)[..., :-1]
    dropped = F.dropout(weights, dropout).to(v.dtype).view(B, K, H // K, T, S)
    return (dropped @ v[:, :, None]).view(B, H, T, D), weights


def _flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    softcap: float | None,
    bias: ScoreBias | None,
    sinks: Tensor | None,
) -> Tensor:
    def modify_score(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if bias is None else score + bias(head, query - key)

    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
    out: Tensor
    out, auxiliary = flex(
        q,
        k,
        v,
        score_mod=None if softcap is None and bias is None else modify_score,
        block_mask=mask,
        enable_gqa=q.size(1) > k.size(1),
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is None:
        return out
    # The sinks multiply the denominator of the softmax, exp(lse), by 1 + exp(sink - lse).
    share = torch.sigmoid(auxiliary.lse - sinks[:, None])  # (B, n_head, T)
    return out * share.unsqueeze(-1).type_as(out)


@cache
def _compiled_flex_attention() -> Any:
    """Return the compiled ``flex_attention``. It is compiled on first use, because the compiler is slow to import.

    Without compilation, FlexAttention would materialize all attention scores.
    """
    return torch.compile(flex_attention)


def can_use_flex_attention(config: "GPTConfig", device: torch.device) -> bool:
    """Return whether FlexAttention supports training a model on a device.

    FlexAttention requires a GPU with Triton, a head dimension of at least ``FLEX_MIN_HEAD_DIM``, and no dropout.
    """
    return device.type == "cuda" and config.head_width >= FLEX_MIN_HEAD_DIM and not config.dropout and has_triton()


def validate_attention_backend(config: "GPTConfig", device: torch.device) -> None:
    """Check that the chosen attention backend supports training on a device.

    Raises:
        UserError: The backend does not support training on the device.
    """
    if config.attention_backend == "flex" and not can_use_flex_attention(config, device):
        raise UserError(
            f"model.gpt.attention_backend is flex, which requires a GPU with Triton and a head dimension of at least "
            f"{FLEX_MIN_HEAD_DIM}, but the device is {device.type} and the head dimension is {config.head_width}; "
            f"choose auto, sdpa or manual"
        )


# Module


class AttentionSinks(nn.Module):
    """Learned logit of each head's attention sink (gpt-oss, https://arxiv.org/abs/2508.10925).

    The sink takes part in the softmax like a token with this score and a value of zero.
    """

    def __init__(self, n_head: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_head))

    def init_weights(self, sampler: WeightSampler) -> None:
        """Initialize the logits to zero, the mean score of tokens with random queries and keys."""
        nn.init.zeros_(self.logits)

    def forward(self) -> Tensor:
        """Return the logits of all heads, or of those on this tensor-parallel process: (n_head,)."""
        return to_local(self.logits)


class Attention(nn.Module):
    r"""Causal multi-head, grouped-query or multi-query self-attention.

    Each group of ``n_head / n_kv_head`` query heads shares one key/value head::

        n_head = 4    n_kv_head = 4       n_kv_head = 2       n_kv_head = 1
        queries       q  q  q  q          q  q  q  q          q  q  q  q
                      |  |  |  |          \  /  \  /           \  \  /  /
        keys, values  kv kv kv kv          kv    kv                kv
                      multi-head          grouped-query       multi-query

    To use custom attention, subclass this class, override ``attend``, ``combine_heads`` or any other method, and set
    ``model.gpt.attention`` to the import path of the subclass.
    """

    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "query": "colwise",
        "key": "colwise",
        "value": "colwise",
        "output": "rowwise",
        "query_norm": "replicated",
        "key_norm": "replicated",
        "sinks": "headwise",
    }

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__()
        self.validate(config)
        self.config = config
        self.sinks = AttentionSinks(config.n_head) if config.attention_sinks else None
        self.recorded_weights: list[Tensor] | None = None
        """List to which each forward pass appends its (B, n_head, T, S) attention weights; None disables recording."""
        self.build_layers()

    @staticmethod
    def validate(config: "GPTConfig") -> None:
        """Check that a config is compatible with the attention class.

        Raises:
            UserError: Two settings contradict each other.
        """
        for name in ("kv_rank", "query_rank", "rope_dim", "value_dim"):
            if (value := getattr(config, f"latent_{name}")) is not None:
                raise UserError(
                    f"model.gpt.latent_{name} is {value}, but model.gpt.attention is {config.attention}; "
                    f"set model.gpt.attention to latent, or remove latent_{name}"
                )

    def build_layers(self) -> None:
        """Build the layers of the module; called by the constructor."""
        config = self.config
        self.n_head = config.n_head
        self.n_kv_head = config.kv_heads
        self.head_dim = config.head_width
        bias = config.bias or config.qkv_bias
        self.query = Linear(config.n_embd, self.n_head * self.head_dim, bias=bias)
        self.key = Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=bias)
        self.value = Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=bias)
        self.output = Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        rms_norm = RMS_NORMS.get(config.norm, RMSNorm)
        self.query_norm, self.key_norm = (
            rms_norm(heads * self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
            for heads in ((self.n_head, self.n_kv_head) if config.qk_norm_joint else (1, 1))
        )

    def forward(
        self,
        x: Tensor,
        position: PositionEncoding,
        layout: AttentionLayout,
        value_embedding: Tensor | None = None,
        layer_cache: tuple[KVCache, int] | None = None,
    ) -> Tensor:
        """Apply self-attention to ``x`` of shape (B, T, n_embd); for the other arguments, see ``Block.forward``."""
        B, T, _ = x.shape  # below, -1 is the number of heads, because a tensor-parallel process holds only some heads
        q, k = self.query(x), self.key(x)
        if self.config.qk_norm_joint:
            q, k = self.query_norm(q), self.key_norm(k)
        q = q.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = k.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        if not self.config.qk_norm_joint:
            q, k = self.query_norm(q), self.key_norm(k)
        v = self.value(x)
        if value_embedding is not None:
            v = v + value_embedding.type_as(v)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        factor = self.config.query_multiplier
        if (scale := self.config.attention_scale) is not None:
            factor *= scale * self.head_dim**0.5  # all attention backends multiply the scores by head_dim ** -0.5
        if factor != 1:
            q = q * factor
        q = position.rotate(q, layout.cos_sin)
        if layout.key_cos_sin is None:
            k = position.rotate(k, layout.cos_sin)
        if layer_cache is not None:
            cache, layer = layer_cache
            k, v = cache.append(layer, k, v)  # (B, n_kv_head, S, head_dim)
        k = position.rotate(k, layout.key_cos_sin)
        y = self.attend(q, k, v, position, layout)  # (B, n_head, T, head_dim)
        return self.combine_heads(y.transpose(1, 2).flatten(2), x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: PositionEncoding, layout: AttentionLayout) -> Tensor:
        """Compute attention for the given queries, keys and values.

        q: (B, n_head, T, head_dim), k and v: (B, n_kv_head, S, head_dim) -> (B, n_head, T, head_dim).
        """
        dropout = self.config.dropout if self.training else 0.0
        bias = position.score_bias if position.has_score_bias else None
        sinks = None if self.sinks is None else self.sinks()
        arguments = q, k, v, dropout, layout.mask, self.config.attention_softcap, bias, sinks
        if self.recorded_weights is not None:
            y, weights = manual_attention(*arguments)
            self.recorded_weights.append(weights)
            return y
        return causal_attention(*arguments, self.config.attention_backend)

    def combine_heads(self, heads: Tensor, x: Tensor) -> Tensor:
        """Project the outputs of all heads to the residual stream.

        Args:
            heads: Concatenated outputs of the heads, of shape (B, T, n_head * head_dim).
            x: Input of the module, of shape (B, T, n_embd), which subclasses may use.

        Returns:
            The output of the module, of shape (B, T, n_embd).
        """
        out: Tensor = self.output(heads)
        return out

    def flops_per_token(self, context: int) -> int:
        """Return the number of FLOPs per token in the forward pass, if each token attends to ``context`` tokens.

        This includes the projections and the matrix multiplications with the keys and values. Operations that the
        causal mask would save are not subtracted.
        """
        return linear_flops_per_token(self) + 4 * self.n_head * self.head_dim * context

    def cache_shapes(self) -> list[tuple[int, int]]:
        """Return the number of heads and channels of each tensor that is appended to the KV cache: keys and values."""
        return [(self.n_kv_head, self.head_dim)] * 2

    def residual_outputs(self) -> list[nn.Linear]:
        """Return the layers whose outputs are added to the residual stream: the output projection."""
        return [self.output]
