"""Rows of uneven lengths as one tensor."""

from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lit_gpt_scratch.batch_types import PADDING_MULTIPLE

EMPTY_ROW: Final[NDArray[np.int64]] = np.zeros(0, dtype=np.int64)
"""A row that is all filling."""

Item = TypeVar("Item")
Made = TypeVar("Made")


class PaddedDataset(Dataset[Made], Generic[Item, Made]):
    """Records of a row each, filled up at their right.

    A subclass says what batch some of them make (``__getitems__``).

    Args:
        items: The ids of each, and what is to be learned of them.
        block_size: The most tokens in a row.
        fill: The token to fill up with; no text sees it, as it stands behind.
    """

    def __init__(self, items: Sequence[Item], block_size: int, fill: int) -> None:
        self.items = items
        self.block_size = block_size
        self.fill = fill

    @property
    def sizes(self) -> list[int]:
        """All in one part."""
        return [len(self)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Made:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Made:
        """A whole batch; an index of ``len(self)`` is a row of nothing."""
        raise NotImplementedError


def pad_rows(rows: Sequence[NDArray[Any]], fill: int, most: int) -> Tensor:
    """Fill rows up at their right to the longest of them.

    Not to what there is room for: short messages in a context of a thousand tokens would cost many times as much.

    Args:
        rows: (n,) integers each.
        fill: What to fill up with; as it stands behind, no token of a text sees it.
        most: The width that is never exceeded, though it be no multiple of ``PADDING_MULTIPLE``.

    Returns:
        (len(rows), T) int64.
    """
    longest = max([1, *map(len, rows)])
    width = min(-(-longest // PADDING_MULTIPLE) * PADDING_MULTIPLE, most)
    found = torch.full((len(rows), width), fill)
    for place, row in enumerate(rows):
        found[place, : len(row)] = torch.from_numpy(row)
    return found
