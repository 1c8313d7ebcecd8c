"""Datasets whose items are whole batches, and the micro-batches that samplers draw from them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

BatchT = TypeVar("BatchT", bound=Mapping[str, object])

RowIndices = NDArray[np.int64]


class MicroBatch(NamedTuple):
    """The row indices of one micro-batch, as a sampler yields them.

    Attributes:
        rows: Rows of this rank's micro-batch, (B,).
        step_rows: Rows of the whole optimizer step over all micro-batches and data-parallel ranks, (N,); None outside
            training. From these the dataset counts the labels by which the loss of the step is divided.
    """

    rows: list[int]
    step_rows: RowIndices | None = None


class RowDataset(Dataset[BatchT], ABC, Generic[BatchT]):
    """Rows that are looked up a batch at a time; an index of ``len(self)`` is a padding row, without a label.

    ``DataLoader(dataset, sampler=..., batch_size=None)`` passes each ``MicroBatch`` of the sampler to ``__getitem__``,
    also in worker processes.
    """

    @property
    def sizes(self) -> list[int]:
        """Rows of each part; all rows are in one part unless several stores are mixed."""
        return [len(self)]

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def make_batch(self, rows: Sequence[int]) -> BatchT:
        """The batch of some rows."""

    @abstractmethod
    def count_labels(self, rows: RowIndices) -> dict[str, Tensor]:
        """The batch entries that normalise the loss of an optimizer step, given its (N,) rows."""

    def __getitem__(self, index: int | MicroBatch) -> BatchT:
        if not isinstance(index, MicroBatch):
            return self.make_batch([index])
        batch = self.make_batch(index.rows)
        if index.step_rows is None:
            return batch
        return cast(BatchT, {**batch, **self.count_labels(index.step_rows)})
