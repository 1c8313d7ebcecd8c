"""One transformer block."""

import torch
from torch import Tensor, nn

from lit_gpt_scratch.model.attention import attention_class
from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.feed_forward import FEED_FORWARD
from lit_gpt_scratch.model.kv_cache import KVCache
from lit_gpt_scratch.model.layout import Layout
from lit_gpt_scratch.model.norms import build_norm
from lit_gpt_scratch.model.positions import Position


class Block(nn.Module):
    """Mix across tokens, then within each token; each part adds its answer to the stream.

    ::

        pre                    post                   sandwich
        x + part(norm(x))      norm(x + part(x))      x + end(part(norm(x)))
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.post = config.norm_placement == "post"
        sandwich = config.norm_placement == "sandwich"
        self.attention_norm = build_norm(config)
        self.attention = attention_class(config.attention)(config)
        self.attention_end = build_norm(config) if sandwich else nn.Identity()
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FEED_FORWARD[config.feed_forward](config)
        self.feed_forward_end = build_norm(config) if sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.mixing = nn.Parameter(torch.tensor([1.0, 0.0])) if config.residual_scalars else None

    def forward(
        self,
        x: Tensor,
        start: Tensor,
        position: Position,
        layout: Layout,
        value_embedding: Tensor | None = None,
        remember: tuple[KVCache, int] | None = None,
    ) -> Tensor:
        """Do the block's work.

        Args:
            x: (B, T, n_embd), the stream.
            start: (B, T, n_embd), the stream before the first block.
            position: How attention knows order.
            layout: Where the tokens stand, and what each may see.
            value_embedding: (B, T, n_kv_head * head_dim), added to attention's values.
            remember: A cache, and the block's number in it.

        Returns:
            (B, T, n_embd).
        """
        if self.mixing is not None:
            x = self.mixing[0] * x + self.mixing[1] * start
        read = x if self.post else self.attention_norm(x)
        x = x + self.dropout(self.attention_end(self.attention(read, position, layout, value_embedding, remember)))
        x = self.attention_norm(x) if self.post else x
        read = x if self.post else self.feed_forward_norm(x)
        x = x + self.dropout(self.feed_forward_end(self.feed_forward(read)))
        return self.feed_forward_norm(x) if self.post else x
