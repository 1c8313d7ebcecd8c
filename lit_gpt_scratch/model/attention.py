"""Causal self-attention: multi-head, grouped-query and multi-query in one class."""

import importlib

from torch import Tensor, nn

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.causal_attention import causal_attention, manual_attention
from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.kv_cache import KVCache
from lit_gpt_scratch.model.layout import Layout
from lit_gpt_scratch.model.linear import Linear
from lit_gpt_scratch.model.norms import RMSNorm
from lit_gpt_scratch.model.positions import Position


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
        position: Position,
        layout: Layout,
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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: Position, layout: Layout) -> Tensor:
        """q: (B, n_head, T, head_dim), k and v: (B, n_kv_head, S, head_dim) -> (B, n_head, T, head_dim)."""
        dropout = self.config.dropout if self.training else 0.0
        bias = position.bias if position.biased else None
        given = q, k, v, dropout, layout.mask, self.config.attention_softcap, bias
        if self.weights is not None:
            y, weights = manual_attention(*given)
            self.weights.append(weights)
            return y
        return causal_attention(*given, self.config.attention_backend)


def attention_class(path: str | None) -> type[Attention]:
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
