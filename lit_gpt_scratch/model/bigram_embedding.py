"""What a token's embedding may know of the token before it."""

import torch
from torch import Tensor, nn


class BigramEmbedding(nn.Module):
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

    def forward(self, input_ids: Tensor, before: Tensor, first: Tensor) -> Tensor:
        """Vectors of pairs.

        Args:
            input_ids: (B, T) int64.
            before: (B, T) int64, the id before each.
            first: (B, T) bool, whether there is none.

        Returns:
            (B, T, width).
        """
        pair = (input_ids * 36_313 + before * 27_191) % self.rows + 1  # (B, T)
        out: Tensor = self.table(pair.masked_fill(first, 0))
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

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x, before: (B, T, width), each token's vector and the one before it, or zeros -> (B, T, width)."""
        return x + torch.sigmoid(self.gate(x)) * self.share * before
