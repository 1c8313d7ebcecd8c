"""Samplers that arrange row indices into micro-batches, and the base class for datasets that return these batches.

The order is a pure function of the seed, epoch, step, world size and rank. There is no sampler state to save and no
shuffled list in memory, so a run can be resumed at any step, on any number of ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from lit_gpt_scratch.data.size_stages import Phase, SizeStages, size_at

BatchT = TypeVar("BatchT", bound=Mapping[str, object])

RowIndices = NDArray[np.int64]


class MicroBatch(NamedTuple):
    """Row indices of one micro-batch, as yielded by a sampler.

    Attributes:
        rows: B row indices of this rank's micro-batch.
        step_rows: N row indices of the whole optimizer step, across all micro-batches and data-parallel ranks, or None
            outside training. The dataset counts the labels in these rows to normalize the loss.
        window: Number of tokens in each of the windows into which rows are split, or None if they are not split.
    """

    rows: list[int]
    step_rows: RowIndices | None = None
    window: int | None = None


class RowDataset(Dataset[BatchT], ABC, Generic[BatchT]):
    """Base class for datasets that return whole batches; the index ``len(self)`` denotes a padding row without labels.

    ``DataLoader(dataset, sampler=..., batch_size=None)`` passes each ``MicroBatch`` from the sampler to
    ``__getitem__``, with or without worker processes.
    """

    @property
    def sizes(self) -> list[int]:
        """Number of rows in each part of the dataset; there is one part unless several token stores are mixed."""
        return [len(self)]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def make_batch(self, rows: Sequence[int]) -> BatchT:
        """Build the batch for the given row indices."""

    @abstractmethod
    def count_labels(self, rows: RowIndices) -> dict[str, Tensor]:
        """Return the batch entries used to normalize the loss of an optimizer step.

        Args:
            rows: Row indices of the whole optimizer step, array of shape (N,).
        """

    def describe_row(self, row: int) -> str:
        """Describe a row, for log and error messages."""
        return f"record {row:,}"

    def __getitem__(self, index: int | MicroBatch) -> BatchT:
        if not isinstance(index, MicroBatch):
            return self.make_batch([index])
        batch = self.make_batch(index.rows)
        if index.window is not None:  # (B, T) -> (B * T / window, window)
            batch = cast(BatchT, {name: cast(Tensor, x).reshape(-1, index.window) for name, x in batch.items()})
        if index.step_rows is None:
            return batch
        return cast(BatchT, {**batch, **self.count_labels(index.step_rows)})


MIXTURE_BLOCK: Final = 4096
"""Maximum number of rows per block of a weighted mixture; in each block, the number of rows from each store is
proportional to its weight."""
ROWS_AT_ONCE: Final = 1024
"""Number of rows whose order is computed at once: enough to amortize the overhead, but few enough that the first
batch is available quickly."""


class ShuffledOrder:
    """Shuffled order of all rows in one store, or in a mixture of several stores.

    The number of positions in an epoch is the total number of rows in all stores. Without weights, an epoch visits
    every row once. With weights, the positions are divided into blocks; in each block, every store fills a share of the
    positions proportional to its weight, and these positions are chosen at random. Each store is traversed repeatedly,
    in a different order each time, regardless of where an epoch ends. A row is therefore repeated only after all rows
    of its store have been visited, except in a block in which a new traversal of the store starts: because the block is
    shuffled, rows of the new traversal may precede the last rows of the previous one.

    Args:
        sizes: Number of rows in each store.
        seed: Seed for all orders.
        weights: Sampling weight of each store, 0 or more. In each block, shares are rounded to whole positions.
    """

    def __init__(self, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None) -> None:
        self.sizes = list(sizes)
        self.block = sum(sizes) if weights is None else min(sum(sizes), MIXTURE_BLOCK)
        self.quotas = self.sizes if weights is None else _shares(self.block, weights)
        self._first_row = np.cumsum([0, *self.sizes])
        self._first_slot = np.cumsum([0, *self.quotas])
        self._slots = Permutations(self.block, (seed, 0))
        self._own = [Permutations(max(size, 1), (seed, 1 + store)) for store, size in enumerate(self.sizes)]

    def __len__(self) -> int:
        """Return the number of positions per epoch."""
        return sum(self.sizes)

    def rows(self, epoch: int, positions: RowIndices) -> RowIndices:
        """Return the row indices at the given positions of an epoch; both are int64 arrays of shape (n,).

        Row indices are counted across all stores.
        """
        block, slots = np.divmod(epoch * len(self) + positions, self.block)
        if len(self.sizes) > 1:  # a single store is shuffled by its own permutation
            slots = self._slots.at(block, slots)
        rows = np.empty_like(slots)
        stores = np.searchsorted(self._first_slot, slots, side="right") - 1
        for store in np.unique(stores):
            mine = stores == store
            drawn = (
                block[mine] * self.quotas[store] + slots[mine] - self._first_slot[store]
            )  # rows drawn from the store so far
            passes, position = np.divmod(drawn, self.sizes[store])
            rows[mine] = self._first_row[store] + self._own[store].at(passes, position)
        return rows


class ShuffledSampler(DistributedSampler[MicroBatch]):
    """Sampler that yields one rank's micro-batches in training order.

    With ``W`` ranks, batch size ``B`` and ``A`` micro-batches per optimizer step, step ``s`` of an epoch uses the
    positions ``s * A * W * B`` to ``(s + 1) * A * W * B - 1``, reshaped to (A, W, B), of which rank ``r`` uses
    ``[:, r]``. The global sequence is therefore independent of the number of ranks, and a run can be resumed at any
    micro-batch without replaying earlier batches. Rows that do not fill a whole optimizer step are omitted, so that an
    epoch ends at the same row for any number of ranks and micro-batches; the omitted rows differ between epochs. If
    there are too few rows for one step, an epoch is a single shorter step, with as many micro-batches as the rows can
    fill.

    If step sizes grow during the run, a step of ``A`` micro-batches becomes several steps of consecutive micro-batches
    in the early stages; the rows and their order stay the same.

    The class inherits from ``DistributedSampler`` because Lightning replaces all other samplers with its own.

    Args:
        order: Order of all rows.
        batch_size: Rows per rank and micro-batch.
        rank: Data-parallel rank of this process, 0 to ``world_size - 1``.
        world_size: Number of data-parallel ranks.
        start: Epoch to start at, and micro-batch within that epoch; later epochs start at their first micro-batch.
        accumulate: Micro-batches per optimizer step.
        limit: Value of ``trainer.limit_train_batches``. An optimizer step that would exceed this limit is shortened.
        repeats: Whether every epoch repeats the rows of the first epoch in the same order.
        stages: Stages in which the sizes of steps and windows grow, or None for constant sizes.
    """

    def __init__(
        self,
        order: ShuffledOrder,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: tuple[int, int] = (0, 0),
        accumulate: int = 1,
        limit: float = 1.0,
        repeats: bool = False,
        stages: SizeStages | None = None,
    ) -> None:
        super().__init__(order, num_replicas=world_size, rank=rank)  # type: ignore[arg-type]  # only its length is used
        self.order = order
        self.batch_size = batch_size
        self.world_size = world_size
        self.start = start
        self.accumulate = accumulate
        self.limit = limit
        self.repeats = repeats
        self.epoch = start[0]
        self.step_phases = [Phase(0, math.inf, accumulate)]
        """Phases of the number of micro-batches per optimizer step."""
        self.window_phases: list[Phase] = []
        """Phases of the number of tokens per window; none if rows are not split."""
        if stages is not None and self.epoch_length:
            self.step_phases, self.window_phases = stages.phases(self.epoch_length, accumulate)

    @property
    def epoch_length(self) -> int:
        """Number of micro-batches in an epoch, as limited by ``limit``."""
        # As in Lightning, an int is a number of micro-batches and a float is a fraction of them.
        return min(self.limit, len(self)) if isinstance(self.limit, int) else int(len(self) * self.limit)

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in a full epoch."""
        filled = len(self.order) // (self.batch_size * self.world_size)
        return filled // self.accumulate * self.accumulate or filled

    def __len__(self) -> int:
        return self.micro_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        first = self.start[1] if self.epoch == self.start[0] else 0
        end = self.epoch_length
        n_steps = -(-len(self) // self.accumulate)
        at_once = max(1, ROWS_AT_ONCE // (self.accumulate * self.world_size * self.batch_size))
        for chunk in range(first // self.accumulate, n_steps, at_once):
            steps = np.arange(chunk, min(chunk + at_once, n_steps))
            for begin, rows in zip((steps * self.accumulate).tolist(), self.step_rows(self.epoch, steps), strict=True):
                n = min(self.accumulate, (end if begin < end else len(self)) - begin)  # micro-batches of this step
                size, window = self.sizes_at(self.epoch, begin)
                for micro_batch in range(max(first - begin, 0), n):
                    step = micro_batch // size * size  # first micro-batch of the step, which may be smaller
                    yield MicroBatch(
                        rows[micro_batch, self.rank].tolist(), rows[step : min(step + size, n)].ravel(), window
                    )

    def sizes_at(self, epoch: int, micro_batch: int) -> tuple[int, int | None]:
        """Return the sizes at a micro-batch of an epoch.

        Returns:
            Number of micro-batches per step, and number of tokens per window, or None if rows are not split.
        """
        position = epoch * self.epoch_length + micro_batch
        window = size_at(self.window_phases, position) if self.window_phases else None
        return size_at(self.step_phases, position), window

    def step_rows(self, epoch: int, steps: RowIndices) -> RowIndices:
        """Return the row indices of the given optimizer steps in an epoch.

        Args:
            epoch: Index of the epoch.
            steps: Indices of the optimizer steps within the epoch, int64 array of shape (n,).

        Returns:
            Row indices, int64 array of shape (n, A, W, B), for ``A`` micro-batches, ``W`` ranks and batch size ``B``.
            ``A`` is at most the number of micro-batches in an epoch.
        """
        shape = (min(self.accumulate, len(self)), self.world_size, self.batch_size)
        positions = steps[:, None] * np.prod(shape) + np.arange(np.prod(shape))
        return self.rows(epoch, positions.ravel()).reshape(-1, *shape)

    def rows(self, epoch: int, positions: RowIndices) -> RowIndices:
        """Return the row indices at the given positions of an epoch; both are int64 arrays of shape (n,)."""
        return self.order.rows(0 if self.repeats else epoch, positions)


class EvaluationSampler(DistributedSampler[MicroBatch]):
    """Sampler for validation and testing that distributes every row once, in order, across the ranks.

    The last batches are padded with the index ``n_rows``, which denotes a padding row without labels. All ranks
    therefore have the same number of batches, all batches have the same shape, and no row is scored twice.

    Args:
        n_rows: Number of rows in the dataset.
        batch_size: Rows per rank and batch.
        rank: Data-parallel rank of this process.
        world_size: Number of data-parallel ranks.
    """

    def __init__(self, n_rows: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(n_rows), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]  # as above
        self.n_rows = n_rows
        self.batch_size = batch_size
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-self.n_rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            positions = np.arange(first, first + self.batch_size) * self.world_size + self.rank
            yield MicroBatch(np.minimum(positions, self.n_rows).tolist())


class SequentialMicroBatches(SequentialSampler):
    """Sampler that yields the micro-batches of the given sampler, for ``trainer.overfit_batches``.

    The class inherits from ``SequentialSampler`` because with ``overfit_batches``, Lightning replaces all other
    samplers with a sampler that yields single rows.

    Args:
        sampler: Sampler whose micro-batches are the same in every epoch.
    """

    def __init__(self, sampler: ShuffledSampler | EvaluationSampler) -> None:
        super().__init__(sampler)  # only its length is used
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        return iter(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; in the first epoch of a resumed run, the sampler skips the micro-batches already used."""
        self.sampler.set_epoch(epoch)


def _shares(length: int, weights: Sequence[float]) -> list[int]:
    """Divide ``length`` into integers in proportion to the weights, rounded by the largest-remainder method."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * length
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: length - shares.sum()]] += 1
    found: list[int] = shares.tolist()
    return found


FEISTEL_ROUNDS: Final = 8
MIN_BITS: Final = 6
"""Minimum number of bits that the Feistel network permutes; with fewer bits, it would not generate all permutations of
a few values with equal probability."""
MAX_LENGTH: Final = 2**62

Words = NDArray[np.uint64]


class Permutations:
    """Family of pseudorandom permutations of 0 to ``n - 1`` that can be evaluated at any position without a table.

    A Feistel network permutes all integers of ``max(MIN_BITS, (n - 1).bit_length())`` bits. A result above ``n - 1`` is
    permuted again until it is at most ``n - 1``, so that the map remains a bijection (cycle walking; Black and Rogaway
    2002, Ciphers with Arbitrary Finite Domains, https://doi.org/10.1007/3-540-45760-7_9).

    Args:
        n: Length of the permutations, 1 to 2**62.
        key: Seed, and an integer that identifies the purpose of the permutations; both non-negative. Permutations with
            different keys or indices are independent.
    """

    def __init__(self, n: int, key: tuple[int, int]) -> None:
        assert 1 <= n <= MAX_LENGTH, n
        self.n = n
        bits = max(MIN_BITS, (n - 1).bit_length())
        self._left, self._right = bits // 2, bits - bits // 2
        self._keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)

    def at(self, number: RowIndices | int, positions: RowIndices) -> RowIndices:
        """Return the permuted values at the given positions.

        Args:
            number: Index of the permutation: a single integer for all positions, or an array of shape (m,).
            positions: Positions from 0 to ``n - 1``, array of shape (m,).

        Returns:
            Permuted values from 0 to ``n - 1``, array of shape (m,).
        """
        numbers = np.asarray(number, dtype=np.uint64)
        if numbers.size and (numbers == numbers.flat[0]).all():  # common case: a single column of keys halves the time
            numbers = numbers.flat[:1]
        keys = _mix(self._keys[:, None] + numbers * np.uint64(0x9E3779B97F4A7C15))  # (FEISTEL_ROUNDS, m or 1)
        values = self._feistel(keys, positions.astype(np.uint64))
        while (outside := np.flatnonzero(values >= self.n)).size:
            values[outside] = self._feistel(keys[:, outside] if keys.shape[1] > 1 else keys, values[outside])
        return values.astype(np.int64)

    def _feistel(self, keys: Words, values: Words) -> Words:
        """Apply the Feistel rounds, each of which swaps the halves and XORs one half with a hash of the other half."""
        a, b = np.uint64(self._left), np.uint64(self._right)
        left, right = values >> b, values & _mask(b)
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & _mask(a))
            a, b = b, a
        return left << b | right


def _mask(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def _mix(x: Words) -> Words:
    """Apply SplitMix64's finalizer (Steele, Lea and Flood 2014), in which every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
