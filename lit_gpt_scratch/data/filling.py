"""Rows of uneven lengths as one tensor."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_gpt_scratch.batch import MULTIPLE

NOTHING: Final[NDArray[np.int64]] = np.zeros(0, dtype=np.int64)
"""A row that is all filling."""


def filled(rows: Sequence[NDArray[Any]], fill: int, most: int) -> Tensor:
    """Fill rows up at their right to the longest of them.

    Not to what there is room for: short messages in a context of a thousand tokens would cost many times as much.

    Args:
        rows: (n,) integers each.
        fill: What to fill up with; as it stands behind, no token of a text sees it.
        most: The width that is never exceeded, though it be no multiple of ``MULTIPLE``.

    Returns:
        (len(rows), T) int64.
    """
    longest = max([1, *map(len, rows)])
    width = min(-(-longest // MULTIPLE) * MULTIPLE, most)
    found = torch.full((len(rows), width), fill)
    for place, row in enumerate(rows):
        found[place, : len(row)] = torch.from_numpy(row)
    return found
