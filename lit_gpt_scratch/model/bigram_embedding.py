"""Modules that add information about the previous token to the token embeddings."""

import torch
from torch import Tensor, nn

from lit_gpt_scratch.model.weight_sampler import WeightSampler


class BigramEmbedding(nn.Module):
    """Learned embedding of bigrams, which are pairs of a token and its predecessor (modded-nanogpt).

    Without this embedding, the first block has to learn to attend to the previous token before the model can
    distinguish bigrams. A multiplicative hash maps bigrams to rows, so several bigrams may share a row.

    Args:
        rows: Number of rows for bigrams. An additional row is used for the first token of a window or document, which
            has no predecessor.
        width: Embedding dimension.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.table = nn.Embedding(rows + 1, width)

    def init_weights(self, sampler: WeightSampler) -> None:
        """Initialize the table to zero, so that bigrams have no effect at the start of training."""
        nn.init.zeros_(self.table.weight)

    def forward(self, input_ids: Tensor, previous_ids: Tensor, is_first: Tensor) -> Tensor:
        """Look up the bigram embeddings.

        Args:
            input_ids: Token ids, int64 tensor of shape (B, T).
            previous_ids: Id of each token's predecessor, int64 tensor of shape (B, T).
            is_first: Bool tensor of shape (T,) or (B, T), True for tokens without a predecessor.

        Returns:
            The bigram embeddings, of shape (B, T, width).
        """
        row = (input_ids * 36_313 + previous_ids * 27_191) % self.rows + 1  # (B, T)
        out: Tensor = self.table(row.masked_fill(is_first, 0))
        return out


class Smear(nn.Module):
    """Module that adds a learned fraction of the previous token's embedding to each embedding (modded-nanogpt).

    Induction heads require keys that contain the previous token (https://arxiv.org/abs/2209.11895). Without this
    module, a block first has to learn to copy the previous token, and the loss plateaus until then.

    Args:
        width: Width of the residual stream.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1, bias=False)
        self.share = nn.Parameter(torch.zeros(width))

    def init_weights(self, sampler: WeightSampler) -> None:
        """Initialize the fraction to zero, so that the previous token has no effect at the start of training."""
        nn.init.zeros_(self.share)

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """Add the gated embedding of the previous token.

        Args:
            x: Embedding of each token, of shape (B, T, width).
            previous: Embedding of each token's predecessor, or zeros if there is none, of shape (B, T, width).

        Returns:
            The sum, of shape (B, T, width).
        """
        return x + torch.sigmoid(self.gate(x)) * self.share * previous
