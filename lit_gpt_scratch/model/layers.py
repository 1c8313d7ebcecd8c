"""The small parts: normalisation, the feed-forward layers, and what the embedding may know of the token before."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_gpt_scratch.model.config import GPTConfig


class RMSNorm(nn.Module):
    """Divide by the root mean square, scale by a learned gain (https://arxiv.org/abs/1910.07467).

    The statistic is taken in float32 whatever the input's type, as Llama and Qwen do.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) -> (..., width), same dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).type_as(x)


class FeedForward(nn.Module):
    """Widen, bend, narrow: ``output(activation(input(x)))``. Subclasses say how to bend."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.input = nn.Linear(config.n_embd, config.ffn_width, bias=False)
        self.output = nn.Linear(config.ffn_width, config.n_embd, bias=False)

    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x: (B, T, n_embd), hidden: (B, T, ffn_dim) -> (B, T, ffn_dim)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, n_embd) -> (B, T, n_embd)."""
        out: Tensor = self.output(self.activation(x, self.input(x)))
        return out


class GELU(FeedForward):
    """GPT-2's: the Gaussian error linear unit in its tanh form (https://arxiv.org/abs/1606.08415)."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.gelu(hidden, approximate="tanh")


class ReLU2(FeedForward):
    """Squared ReLU (https://arxiv.org/abs/2109.08668)."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.relu(hidden).square()


class SwiGLU(FeedForward):
    """A third matrix makes a gate for each hidden channel (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.n_embd, config.ffn_width, bias=False)

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * hidden


FEED_FORWARD: dict[str, type[FeedForward]] = {"gelu": GELU, "relu2": ReLU2, "swiglu": SwiGLU}


class Bigrams(nn.Module):
    """A learned vector for every pair of a token and the one before it (modded-nanogpt).

    Attention in the first block would have to learn to look one token back before it could tell pairs apart;
    a table knows at once. Pairs are spread over the rows by a multiplicative hash and share them.

    Args:
        rows: Rows that the pairs share; one more is for the first token of a window or a document, which has none
            before it.
        width: Channels of a vector.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.table = nn.Embedding(rows + 1, width)
        nn.init.zeros_(self.table.weight)

    def forward(self, input_ids: Tensor, first: Tensor | None = None) -> Tensor:
        """input_ids: (B, T) int64, first: (B, T) bool, whether a token begins a document -> (B, T, width)."""
        pair = (input_ids[:, 1:] * 36_313 + input_ids[:, :-1] * 27_191) % self.rows + 1  # (B, T - 1)
        pair = F.pad(pair, (1, 0))  # (B, T)
        out: Tensor = self.table(pair if first is None else pair.masked_fill(first, 0))
        return out


class Smear(nn.Module):
    """Add to every token's vector a learned share of the one before it (modded-nanogpt).

    A head that looks for what followed the same token earlier needs keys that know the token before theirs
    (https://arxiv.org/abs/2209.11895). Without this, a block has to learn first to fetch it, and the loss stays on a
    plateau until one has.

    Args:
        width: Channels of the stream.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1, bias=False)
        self.share = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        """x: (B, T, width), first: (B, T) bool, whether a token begins a document -> (B, T, width)."""
        before = F.pad(x[:, :-1], (0, 0, 1, 0))  # (B, T, width)
        if first is not None:
            before = before.masked_fill(first[..., None], 0.0)
        return x + torch.sigmoid(self.gate(x)) * self.share * before
