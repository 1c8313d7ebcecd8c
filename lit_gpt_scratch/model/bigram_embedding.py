"""Additions to the token embeddings that depend on the previous token."""

import torch
from torch import Tensor, nn


class BigramEmbedding(nn.Module):
    """A learned vector for each pair of a token and its predecessor (modded-nanogpt).

    Attention in the first block would have to learn to look one token back before it could distinguish bigrams; a
    table does so from the start. A multiplicative hash maps bigrams to rows, which they share.

    Args:
        rows: Rows for bigrams; one more is for the first token of a window or document, which has no predecessor.
        width: Channels of a vector.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.table = nn.Embedding(rows + 1, width)

    def init_weights(self) -> None:
        """Zero, so that training starts from the network without bigrams."""
        nn.init.zeros_(self.table.weight)

    def forward(self, input_ids: Tensor, previous_ids: Tensor, is_first: Tensor) -> Tensor:
        """Look up the vectors.

        Args:
            input_ids: (B, T) int64.
            previous_ids: (B, T) int64, each token's predecessor.
            is_first: (T,) or (B, T) bool, whether a token has no predecessor.

        Returns:
            (B, T, width).
        """
        row = (input_ids * 36_313 + previous_ids * 27_191) % self.rows + 1  # (B, T)
        out: Tensor = self.table(row.masked_fill(is_first, 0))
        return out


class Smear(nn.Module):
    """Add a learned, gated share of the previous token's embedding to each token's (modded-nanogpt).

    An induction head needs keys that contain the previous token (https://arxiv.org/abs/2209.11895). Without this, a
    block first has to learn to copy it, and the loss stays on a plateau until one has.

    Args:
        width: Channels of the residual stream.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1, bias=False)
        self.share = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """x, previous: (B, T, width), a token's embedding and its predecessor's, or zeros -> (B, T, width)."""
        return x + torch.sigmoid(self.gate(x)) * self.share * previous
