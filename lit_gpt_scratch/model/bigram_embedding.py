"""Modules that add information about the previous token to the token embeddings."""

import torch
from torch import Tensor, nn


class BigramEmbedding(nn.Module):
    """Learned embedding of each pair of a token and its predecessor (modded-nanogpt).

    Without it, attention in the first block has to learn to look one token back before it can distinguish bigrams.
    A multiplicative hash maps bigrams to rows, so several bigrams share a row.

    Args:
        rows: Number of rows for bigrams. An additional row is used for the first token of a window or document, which
            has no predecessor.
        width: Embedding dimension.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.table = nn.Embedding(rows + 1, width)

    def init_weights(self) -> None:
        """Initialise the table to zero, so that bigrams have no effect at the start of training."""
        nn.init.zeros_(self.table.weight)

    def forward(self, input_ids: Tensor, previous_ids: Tensor, is_first: Tensor) -> Tensor:
        """Look up the bigram embeddings.

        Args:
            input_ids: (B, T) int64.
            previous_ids: (B, T) int64, the predecessor of each token.
            is_first: (T,) or (B, T) bool, whether a token has no predecessor.

        Returns:
            (B, T, width).
        """
        row = (input_ids * 36_313 + previous_ids * 27_191) % self.rows + 1  # (B, T)
        out: Tensor = self.table(row.masked_fill(is_first, 0))
        return out


class Smear(nn.Module):
    """Add a learned, gated fraction of the previous token's embedding to each token's embedding (modded-nanogpt).

    An induction head requires keys that contain the previous token (https://arxiv.org/abs/2209.11895). Without this
    module, a block first has to learn to copy the previous token, and the loss stays on a plateau until it has.

    Args:
        width: Width of the residual stream.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1, bias=False)
        self.share = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """Add the gated embedding of the previous token.

        Args:
            x: (B, T, width), the embedding of each token.
            previous: (B, T, width), the embedding of each token's predecessor; zeros for a token without one.

        Returns:
            (B, T, width).
        """
        return x + torch.sigmoid(self.gate(x)) * self.share * previous
