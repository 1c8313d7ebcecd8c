"""One transformer block."""

from torch import Tensor, nn

from lit_gpt_scratch.model.attention import Attention
from lit_gpt_scratch.model.config import GPTConfig
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

    def forward(self, x: Tensor, position: Position) -> Tensor:
        """x: (B, T, n_embd) -> (B, T, n_embd)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), position))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x  # noqa: RET504 - the two lines are alike on purpose
