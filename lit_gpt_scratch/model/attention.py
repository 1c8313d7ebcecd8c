"""Causal self-attention: multi-head, grouped-query and multi-query in one class."""

from torch import Tensor, nn

from lit_gpt_scratch.model.causal_attention import causal_attention
from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.documents import Documents
from lit_gpt_scratch.model.layers import RMSNorm
from lit_gpt_scratch.model.positions import Position


class Attention(nn.Module):
    r"""Every token looks back at itself and the tokens before it.

    Heads share keys and values in groups of ``n_head / n_kv_head``::

        n_head = 4    n_kv_head = 4       n_kv_head = 2       n_kv_head = 1
        queries       q  q  q  q          q  q  q  q          q  q  q  q
                      |  |  |  |          \  /  \  /           \  \  /  /
        keys, values  kv kv kv kv          kv    kv                kv
                      multi-head          grouped-query       multi-query
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.kv_heads
        self.head_dim = config.head_width
        self.dropout = config.dropout
        self.query = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=False)
        self.key = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.value = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.output = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=False)
        self.query_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        position: Position,
        value_embedding: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """x: (B, T, n_embd), value_embedding: (B, T, n_kv_head * head_dim) -> (B, T, n_embd)."""
        B, T, _ = x.shape
        q = self.query(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = self.key(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        v = self.value(x)
        if value_embedding is not None:
            v = v + value_embedding.type_as(v)
        v = v.view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        positions, mask = documents or (None, None)
        q = position.rotate(self.query_norm(q), positions)
        k = position.rotate(self.key_norm(k), positions)
        y = causal_attention(q, k, v, self.dropout if self.training else 0.0, mask)  # (B, n_head, T, head_dim)
        y = y.transpose(1, 2).reshape(B, T, self.n_head * self.head_dim)
        out: Tensor = self.output(y)  # (B, T, n_embd)
        return out
