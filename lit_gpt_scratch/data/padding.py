"""Combine rows of different lengths into one tensor by right-padding."""

from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_gpt_scratch.batch_types import PADDING_MULTIPLE
from lit_gpt_scratch.data.sampler import BatchT, RowDataset

EMPTY_ROW: Final[NDArray[np.int64]] = np.zeros(0, dtype=np.int64)
"""Token ids of a padding row, which has no tokens."""

Item = TypeVar("Item")


class PaddedDataset(RowDataset[BatchT], Generic[Item, BatchT]):
    """Base class for datasets with one right-padded record per row.

    Args:
        items: Token ids and labels of each record.
        block_size: Maximum tokens per row.
        fill: Token id used for padding. Padding comes last, so with causal attention no text token attends to it.
    """

    def __init__(self, items: Sequence[Item], block_size: int, fill: int) -> None:
        self.items = items
        self.block_size = block_size
        self.fill = fill

    def __len__(self) -> int:
        return len(self.items)


def pad_rows(rows: Sequence[NDArray[Any]], fill: int, most: int) -> Tensor:
    """Right-pad rows to the length of the longest row, rounded up to a multiple of ``PADDING_MULTIPLE``.

    Rows are not padded to the context length, because short rows would then require many times as much computation.

    Args:
        rows: Integer arrays, each of shape (n,).
        fill: Padding value.
        most: Maximum length of the padded rows, not necessarily a multiple of ``PADDING_MULTIPLE``.

    Returns:
        Padded rows, (len(rows), T) int64.
    """
    longest = max([1, *map(len, rows)])
    width = min(-(-longest // PADDING_MULTIPLE) * PADDING_MULTIPLE, most)
    padded = torch.full((len(rows), width), fill)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.from_numpy(row)
    return padded
