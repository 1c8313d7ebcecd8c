"""Multi-head latent attention (MLA), which caches one small vector per token instead of all keys and values."""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.kernels.onednn_linear import LINEAR_CLASSES, Linear
from lit_gpt_scratch.model.attention import Attention, AttentionLayout
from lit_gpt_scratch.model.kv_cache import KVCache
from lit_gpt_scratch.model.local_shard import linear_on_local_shard, to_local
from lit_gpt_scratch.model.module_metadata import linear_flops_per_token
from lit_gpt_scratch.model.norms import RMS_NORMS, RMSNorm
from lit_gpt_scratch.model.positions import PositionEncoding

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig


class LatentAttention(Attention):
    r"""Multi-head latent attention of DeepSeek-V2 and V3 (https://arxiv.org/abs/2405.04434, section 2.1).

    Keys and values of all heads are linear functions of one latent vector per token. As the position encoding would
    prevent this, it is applied to additional channels: each head has its own for queries, and all heads share those of
    the keys (decoupled RoPE)::

        x -- kv_down --+-- latent (kv_rank) -- kv_norm --+-- kv_up --> keys (head_dim) and values (value_dim) per head
                       |                                 |
                       +-- shared key (rope_dim) -- rotate --> cache: kv_rank + rope_dim elements per token

        x -- query_down -- query_norm -- query_up --> queries (head_dim + rope_dim) per head; without a query rank,
        x -- query --> queries

    A pass with a cache multiplies the queries by the key half of ``kv_up`` instead of the latents, and the output of
    attention by its value half, if that takes fewer operations (absorption, see ``absorbs``). Attention over the
    latents is then multi-query attention with a single key/value head.

    As in DeepSeek's models, the norms (``config.qk_norm``) are applied to the latents, ``query``, ``query_up`` and
    ``kv_up`` have no biases, and the factor by which ``yarn`` scales attention scores applies to all channels. The
    rotated channels are in the half-split layout of ``RotaryPositions``; in DeepSeek's checkpoints they are
    interleaved, so that importing one permutes the rows that produce them: even channels first.
    """

    tensor_parallel_plan: ClassVar[dict[str, str]] = {
        "query": "colwise",
        "query_down": "replicated",
        "query_norm": "replicated",
        "query_up": "colwise",
        "kv_down": "replicated",
        "kv_norm": "replicated",
        "kv_up": "colwise",
        "output": "rowwise",
        "sinks": "headwise",
    }

    @staticmethod
    @override
    def validate(config: "GPTConfig") -> None:
        if config.n_kv_head not in (None, config.n_head):
            raise UserError(
                f"model.gpt.n_kv_head is {config.n_kv_head}, but latent attention has keys and values for each of the "
                f"{config.n_head} query heads; remove n_kv_head, and set model.gpt.latent_kv_rank for a smaller cache"
            )
        for name, reason in (
            ("value_embeddings", "which does not cache the values to which they would be added"),
            ("qk_norm_joint", "whose norms are those of the latents"),
        ):
            if getattr(config, name):
                raise UserError(
                    f"model.gpt.{name} is true, which is not supported with latent attention, {reason}; set it to false"
                )
        if config.attention_scale is not None:
            raise UserError(
                f"model.gpt.attention_scale is {config.attention_scale}, which is not supported with latent attention; "
                "remove it"
            )
        if config.parametrisation == "mup":
            raise UserError(
                "model.gpt.parametrisation is mup, which has no rules for the ranks of latent attention; set it to "
                "standard"
            )
        if config.latent_rope_width % 2 and config.position == "rotary":
            raise UserError(f"model.gpt.latent_rope_dim is {config.latent_rope_dim}; it must be even")
        if config.latent_value_width > config.head_width + config.latent_rope_width:
            raise UserError(
                f"model.gpt.latent_value_dim is {config.latent_value_dim}, but the keys have only "
                f"{config.head_width} + {config.latent_rope_width} channels; choose a smaller latent_value_dim, or a "
                f"larger model.gpt.head_dim or latent_rope_dim"
            )

    @override
    def build_layers(self) -> None:
        config = self.config
        self.n_head = config.n_head
        self.head_dim, self.rope_dim = config.head_width, config.latent_rope_width
        self.value_dim, self.kv_rank = config.latent_value_width, config.latent_kv_width
        query_dim, query_rank = self.head_dim + self.rope_dim, config.latent_query_rank
        bias = config.bias or config.qkv_bias

        def norm(width: int) -> RMSNorm | nn.Identity:
            return RMS_NORMS.get(config.norm, RMSNorm)(width, config.norm_eps) if config.qk_norm else nn.Identity()

        if query_rank is None:
            self.query = Linear(config.n_embd, self.n_head * query_dim, bias=False)
        else:
            self.query_down = Linear(config.n_embd, query_rank, bias=bias)
            self.query_norm = norm(query_rank)
            self.query_up = Linear(query_rank, self.n_head * query_dim, bias=False)
        self.kv_down = Linear(config.n_embd, self.kv_rank + self.rope_dim, bias=bias)
        self.kv_norm = norm(self.kv_rank)
        self.kv_up = Linear(self.kv_rank, self.n_head * (self.head_dim + self.value_dim), bias=False)
        self.output = Linear(self.n_head * self.value_dim, config.n_embd, bias=config.bias)

    @override
    def forward(
        self,
        x: Tensor,
        position: PositionEncoding,
        layout: AttentionLayout,
        value_embedding: Tensor | None = None,
        layer_cache: tuple[KVCache, int] | None = None,
    ) -> Tensor:
        B, T, _ = x.shape  # below, -1 is the number of heads, because a tensor-parallel process holds only some heads
        if self.config.latent_query_rank is None:
            q = self.query(x)
        else:
            q = linear_on_local_shard(self.query_up, self.query_norm(self.query_down(x)))
        q = q.view(B, T, -1, self.head_dim + self.rope_dim).transpose(1, 2)  # (B, n_head, T, head_dim + rope_dim)
        q, q_rope = torch.split(q, [self.head_dim, self.rope_dim], dim=-1)
        q = position.scale(q, layout.cos_sin)  # (B, n_head, T, head_dim)
        q_rope = position.rotate(q_rope, layout.cos_sin)  # (B, n_head, T, rope_dim)

        latents = self.kv_down(x)[:, None]  # (B, 1, T, kv_rank + rope_dim)
        latent, k_rope = torch.split(latents, [self.kv_rank, self.rope_dim], dim=-1)
        k_rope = position.rotate(k_rope, layout.cos_sin)  # (B, 1, T, rope_dim)
        latents = torch.cat((self.kv_norm(latent), k_rope), dim=-1)  # (B, 1, T, kv_rank + rope_dim)
        if layer_cache is not None:
            cache, layer = layer_cache
            (latents,) = cache.append(layer, latents)  # (B, 1, S, kv_rank + rope_dim)
        absorbs = layer_cache is not None and self.absorbs(T, latents.size(2))
        attend = self._attend_to_latents if absorbs else self._attend_to_heads
        y = attend(q, q_rope, latents, position, layout)  # (B, n_head, T, value_dim)
        return self.combine_heads(y.transpose(1, 2).flatten(2), x)  # (B, T, n_head * value_dim) -> (B, T, n_embd)

    def absorbs(self, queries: int, keys: int) -> bool:
        """Return whether attention over the latents takes fewer operations than computing all keys and values.

        Per head, computing them takes kv_rank * (head_dim + value_dim) multiplications per key, and multiplying
        queries and outputs by ``kv_up`` takes as many per query. But each query-key pair then takes
        2 * kv_rank + rope_dim multiplications instead of head_dim + rope_dim + value_dim. Decoding has one query and
        many keys, so it absorbs; a long prompt does not, unless ``kv_rank`` is very small. A layer with an adapter that
        is not merged has no weight that could be absorbed.

        Args:
            queries: Number of queries (T).
            keys: Number of keys (S).
        """
        if type(self.kv_up) not in LINEAR_CLASSES:
            return False
        projection = self.kv_rank * (self.head_dim + self.value_dim)
        per_pair = (2 * self.kv_rank + self.rope_dim) - (self.head_dim + self.rope_dim + self.value_dim)
        return queries * projection + queries * keys * per_pair < keys * projection

    def _attend_to_heads(
        self, q: Tensor, q_rope: Tensor, latents: Tensor, position: PositionEncoding, layout: AttentionLayout
    ) -> Tensor:
        """Compute the keys and values of all heads, and attend to them.

        q: (B, n_head, T, head_dim), q_rope: (B, n_head, T, rope_dim), latents: (B, 1, S, kv_rank + rope_dim) ->
        (B, n_head, T, value_dim).
        """
        B, _, S, _ = latents.shape
        latent, k_rope = torch.split(latents, [self.kv_rank, self.rope_dim], dim=-1)
        kv = linear_on_local_shard(self.kv_up, latent[:, 0])  # (B, S, n_head * (head_dim + value_dim))
        kv = kv.view(B, S, -1, self.head_dim + self.value_dim).transpose(1, 2)  # (B, n_head, S, head_dim + value_dim)
        k, v = torch.split(kv, [self.head_dim, self.value_dim], dim=-1)
        k = torch.cat((k, k_rope.expand(-1, k.size(1), -1, -1)), dim=-1)  # (B, n_head, S, head_dim + rope_dim)
        # Fused kernels require values of the same width as the keys.
        v = F.pad(v, (0, self.head_dim + self.rope_dim - self.value_dim))
        y = self.attend(torch.cat((q, q_rope), dim=-1), k, v, position, layout)
        return y[..., : self.value_dim]

    def _attend_to_latents(
        self, q: Tensor, q_rope: Tensor, latents: Tensor, position: PositionEncoding, layout: AttentionLayout
    ) -> Tensor:
        """Compute the same as ``_attend_to_heads``, but multiply the queries and the output by the weight of ``kv_up``.

        The dot product of a query q and a key W_k c equals that of W_k^T q and the latent c, and a weighted sum of
        values W_v c equals W_v times the weighted sum of the latents.
        """
        weight = to_local(self.kv_up.weight).view(-1, self.head_dim + self.value_dim, self.kv_rank)
        w_k, w_v = torch.split(
            weight, [self.head_dim, self.value_dim], dim=1
        )  # (n_head, head_dim or value_dim, kv_rank)
        q = torch.cat((q @ w_k, q_rope), dim=-1)  # (B, n_head, T, kv_rank + rope_dim)
        # Attention divides the scores by the square root of the width of its queries.
        q = q * (q.size(-1) / (self.head_dim + self.rope_dim)) ** 0.5
        # The values include the shared key, which is dropped afterwards, so that they have the width of the keys.
        y = self.attend(q, latents, latents, position, layout)
        out: Tensor = y[..., : self.kv_rank] @ w_v.mT  # (B, n_head, T, value_dim)
        return out

    @override
    def flops_per_token(self, context: int) -> int:
        return linear_flops_per_token(self) + 2 * self.n_head * context * (
            self.head_dim + self.rope_dim + self.value_dim
        )

    @override
    def cache_shapes(self) -> list[tuple[int, int]]:
        return [(1, self.kv_rank + self.rope_dim)]
