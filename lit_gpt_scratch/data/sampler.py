"""Micro-batches of rows: their order, and the base of the datasets that look them up.

The order is a pure function of seed, epoch, step, world size and rank. There is no state to lose and no shuffled list
to keep, so a run can be resumed at any step, on any number of ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, Generic, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

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

    def describe_row(self, row: int) -> str:
        """Name what a row contains, for a message."""
        return f"record {row:,}"

    def __getitem__(self, index: int | MicroBatch) -> BatchT:
        if not isinstance(index, MicroBatch):
            return self.make_batch([index])
        batch = self.make_batch(index.rows)
        if index.step_rows is None:
            return batch
        return cast(BatchT, {**batch, **self.count_labels(index.step_rows)})


MIXTURE_BLOCK: Final = 4096
"""Positions within which a mixture has its exact proportions."""
ROWS_AT_ONCE: Final = 1024
"""Rows whose order is computed together: this amortises the cost of a call, and seeking stays instant."""


class ShuffledOrder:
    """The order of all rows of one store, or of a mixture of several.

    An epoch has as many positions as all stores have rows. Without weights an epoch is every row of each store, once.
    With weights the positions come in blocks, in each of which every store has its share, at random positions. Each
    store is passed through again and again, in a different order each time, regardless of where an epoch ends; so no
    row repeats before all rows of its store have come, except within one block.

    Args:
        sizes: Rows of each store.
        seed: Changes every order.
        weights: Of each store, 0 or more; shares are exact to one position of a block.
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
        """Positions of an epoch."""
        return sum(self.sizes)

    def rows(self, epoch: int, positions: RowIndices) -> RowIndices:
        """The rows at some positions of an epoch, numbered through all stores: (n,) int64 -> (n,) int64."""
        block, slots = np.divmod(epoch * len(self) + positions, self.block)
        if len(self.sizes) > 1:  # a single store is shuffled by its own permutation
            slots = self._slots.at(block, slots)
        rows = np.empty_like(slots)
        stores = np.searchsorted(self._first_slot, slots, side="right") - 1
        for store in np.unique(stores):
            mine = stores == store
            drawn = block[mine] * self.quotas[store] + slots[mine] - self._first_slot[store]  # from this store, ever
            passes, position = np.divmod(drawn, self.sizes[store])
            rows[mine] = self._first_row[store] + self._own[store].at(passes, position)
        return rows


class ShuffledSampler(DistributedSampler[MicroBatch]):
    """The training order of one rank, as micro-batches.

    With ``W`` ranks, batch size ``B`` and ``A`` micro-batches per optimizer step, step ``s`` of an epoch takes its
    positions ``s * A * W * B`` to ``(s + 1) * A * W * B``, reshaped to (A, W, B); rank ``r`` takes ``[:, r]``. So the
    global sequence doesn't depend on the number of ranks, and a run resumes anywhere without replaying what came
    before. Rows that don't fill a whole optimizer step are left out, so that an epoch ends at the same row whatever the
    layout; which rows differs by epoch. If there are fewer rows than one step needs, an epoch is one short step of the
    micro-batches that they fill.

    It is a ``DistributedSampler`` because Lightning replaces any other kind of sampler with its own.

    Args:
        order: The order of all rows.
        batch_size: Rows per rank and micro-batch.
        rank: The data-parallel rank of this process, 0 to ``world_size - 1``.
        world_size: Number of data-parallel ranks.
        start: Epoch, and micro-batch in it, at which to start; later epochs start at their first.
        accumulate: Micro-batches per optimizer step.
        limit: ``trainer.limit_train_batches``, which shortens an epoch's last step.
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
    ) -> None:
        super().__init__(order, num_replicas=world_size, rank=rank)  # type: ignore[arg-type]  # it needs a length only
        self.order = order
        self.batch_size = batch_size
        self.world_size = world_size
        self.start = start
        self.accumulate = accumulate
        self.limit = limit
        self.epoch = start[0]

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a whole epoch."""
        filled = len(self.order) // (self.batch_size * self.world_size)
        return filled // self.accumulate * self.accumulate or filled

    def __len__(self) -> int:
        return self.micro_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        first = self.start[1] if self.epoch == self.start[0] else 0
        # As Lightning computes it: an int is a number of micro-batches, a float a share of them.
        end = min(self.limit, len(self)) if isinstance(self.limit, int) else int(len(self) * self.limit)
        n_steps = -(-len(self) // self.accumulate)
        at_once = max(1, ROWS_AT_ONCE // (self.accumulate * self.world_size * self.batch_size))
        for chunk in range(first // self.accumulate, n_steps, at_once):
            steps = np.arange(chunk, min(chunk + at_once, n_steps))
            for begin, rows in zip((steps * self.accumulate).tolist(), self.step_rows(self.epoch, steps), strict=True):
                n = min(self.accumulate, (end if begin < end else len(self)) - begin)  # micro-batches of this step
                for micro_batch in range(max(first - begin, 0), n):
                    yield MicroBatch(rows[micro_batch, self.rank].tolist(), rows[:n].ravel())

    def step_rows(self, epoch: int, steps: RowIndices) -> RowIndices:
        """The rows of some optimizer steps of an epoch: (n,) int64 -> (n, A, W, B) int64."""
        shape = (self.accumulate, self.world_size, self.batch_size)
        positions = steps[:, None] * np.prod(shape) + np.arange(np.prod(shape))
        return self.rows(epoch, positions.ravel()).reshape(-1, *shape)

    def rows(self, epoch: int, positions: RowIndices) -> RowIndices:
        """The rows at some positions of an epoch: (n,) int64 -> (n,) int64."""
        return self.order.rows(epoch, positions)


class EvaluationSampler(DistributedSampler[MicroBatch]):
    """Validation and test: every row once, in order, distributed over the ranks in whole batches.

    The last batches are filled with the index one past the last row, which stands for a padding row without labels, the
    same number of batches on every rank: batches keep one shape, and no row is scored twice.

    Args:
        n_rows: Rows of the dataset.
        batch_size: Rows per rank and batch.
        rank: The data-parallel rank of this process.
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


def _shares(length: int, weights: Sequence[float]) -> list[int]:
    """Integers that sum to ``length``, in proportion to the weights, by the method of largest remainders."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * length
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: length - shares.sum()]] += 1
    found: list[int] = shares.tolist()
    return found


FEISTEL_ROUNDS: Final = 8
MIN_BITS: Final = 6
"""With fewer bits, the orders of a handful of values are not equally probable."""
MAX_LENGTH: Final = 2**62

Words = NDArray[np.uint64]


class Permutations:
    """Pseudorandom permutations of 0 to ``n - 1``, one for each number, evaluated at any positions without a table.

    A Feistel network permutes all values of at least as many bits as ``n`` needs; a value that falls outside 0 to
    ``n - 1`` is permuted again until it is inside, which keeps the map a bijection (cycle walking; Black and Rogaway
    2002, Ciphers with Arbitrary Finite Domains, https://doi.org/10.1007/3-540-45760-7_9).

    Args:
        n: Length, 1 to 2**62.
        key: Two integers of 0 or more, a seed and a purpose. Permutations of different keys or numbers are independent.
    """

    def __init__(self, n: int, key: tuple[int, int]) -> None:
        assert 1 <= n <= MAX_LENGTH, n
        self.n = n
        bits = max(MIN_BITS, (n - 1).bit_length())
        self._left, self._right = bits // 2, bits - bits // 2
        self._keys = np.random.SeedSequence(key).generate_state(FEISTEL_ROUNDS, np.uint64)

    def at(self, number: RowIndices | int, positions: RowIndices) -> RowIndices:
        """The values at some positions.

        Args:
            number: Of the permutation, one for all positions or (m,) for each.
            positions: (m,), each 0 to ``n - 1``.

        Returns:
            (m,), each 0 to ``n - 1``.
        """
        numbers = np.asarray(number, dtype=np.uint64)
        if numbers.size and (numbers == numbers.flat[0]).all():  # the common case, in half the time
            numbers = numbers.flat[:1]
        keys = _mix(self._keys[:, None] + numbers * np.uint64(0x9E3779B97F4A7C15))  # (FEISTEL_ROUNDS, m or 1)
        values = self._feistel(keys, positions.astype(np.uint64))
        while (outside := np.flatnonzero(values >= self.n)).size:
            values[outside] = self._feistel(keys[:, outside] if keys.shape[1] > 1 else keys, values[outside])
        return values.astype(np.int64)

    def _feistel(self, keys: Words, values: Words) -> Words:
        """Each round swaps the halves and XORs one with a hash of the other."""
        a, b = np.uint64(self._left), np.uint64(self._right)
        left, right = values >> b, values & _mask(b)
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & _mask(a))
            a, b = b, a
        return left << b | right


def _mask(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
