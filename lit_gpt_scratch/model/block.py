"""One transformer block."""

import torch
from torch import Tensor, nn

from lit_gpt_scratch.model.attention import Attention
from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.documents import Documents
from lit_gpt_scratch.model.layers import FEED_FORWARD, RMSNorm
from lit_gpt_scratch.model.positions import Position


class Block(nn.Module):
    """Mix across tokens, then within each token; each part reads a normalised copy and adds its answer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.n_embd)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.n_embd)
        self.feed_forward = FEED_FORWARD[config.feed_forward](config)
        self.dropout = nn.Dropout(config.dropout)
        self.mixing = nn.Parameter(torch.tensor([1.0, 0.0])) if config.residual_scalars else None

    def forward(
        self,
        x: Tensor,
        start: Tensor,
        position: Position,
        value_embedding: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Do the block's work.

        Args:
            x: (B, T, n_embd), the stream.
            start: (B, T, n_embd), the stream before the first block.
            position: How attention knows order.
            value_embedding: (B, T, n_kv_head * head_dim), added to attention's values.
            documents: What each token may see, if not all before it.

        Returns:
            (B, T, n_embd).
        """
        if self.mixing is not None:
            x = self.mixing[0] * x + self.mixing[1] * start
        x = x + self.dropout(self.attention(self.attention_norm(x), position, value_embedding, documents))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x  # noqa: RET504 - the two lines are alike on purpose
