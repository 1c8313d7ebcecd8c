"""Rows of different lengths as one tensor."""

from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_gpt_scratch.batch_types import PADDING_MULTIPLE
from lit_gpt_scratch.data.sampler import BatchT, RowDataset

EMPTY_ROW: Final[NDArray[np.int64]] = np.zeros(0, dtype=np.int64)
"""The token ids of a padding row."""

Item = TypeVar("Item")


class PaddedDataset(RowDataset[BatchT], Generic[Item, BatchT]):
    """One record per row, padded at the right.

    Args:
        items: The token ids and labels of each record.
        block_size: The most tokens of a row.
        fill: The token to pad with; as it comes last, no token of a text attends to it.
    """

    def __init__(self, items: Sequence[Item], block_size: int, fill: int) -> None:
        self.items = items
        self.block_size = block_size
        self.fill = fill

    def __len__(self) -> int:
        return len(self.items)


def pad_rows(rows: Sequence[NDArray[Any]], fill: int, most: int) -> Tensor:
    """Pad rows at the right to the length of the longest one.

    Not to the context length: short messages in a context of a thousand tokens would cost many times as much.

    Args:
        rows: (n,) integers each.
        fill: The padding value; as it comes last, no token of a text attends to it.
        most: The maximal length, which need not be a multiple of ``PADDING_MULTIPLE``.

    Returns:
        (len(rows), T) int64.
    """
    longest = max([1, *map(len, rows)])
    width = min(-(-longest // PADDING_MULTIPLE) * PADDING_MULTIPLE, most)
    padded = torch.full((len(rows), width), fill)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.from_numpy(row)
    return padded
