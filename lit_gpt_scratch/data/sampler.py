"""Which window comes when: a pure function, with no state to lose and no shuffled list to keep."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

BLOCK: Final = 4096
"""Places in which a mixture has its shares."""
AT_ONCE: Final = 1024
"""Windows that are looked up together: what a call costs is shared, and seeking stays instant."""


class ShuffledOrder:
    """The order of all windows of one store, or of several that are mixed.

    An epoch has as many places as there are windows in all stores. Without weights it is every window of each store,
    once. With weights the places are dealt out in blocks, in each of which every store has its share, at places that
    chance decides. Each store goes through its own windows pass after pass, in another order each time, whether an
    epoch ends in between or not; so none comes again before all have come, but for those of one block.

    Args:
        sizes: Windows of each store.
        seed: Changes every order.
        weights: Of each store, 0 or more; a share is right to one place of a block.
    """

    def __init__(self, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None) -> None:
        self.sizes = list(sizes)
        self.block = sum(sizes) if weights is None else min(sum(sizes), BLOCK)
        self.quotas = self.sizes if weights is None else _shares(self.block, weights)
        self._first_window = np.cumsum([0, *self.sizes])
        self._first_slot = np.cumsum([0, *self.quotas])
        self._slots = Permutations(self.block, (seed, 0))
        self._own = [Permutations(max(size, 1), (seed, 1 + store)) for store, size in enumerate(self.sizes)]

    def __len__(self) -> int:
        """Places in an epoch."""
        return sum(self.sizes)

    def windows(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows at some places of an epoch, counted through all stores; (n,) int64."""
        block, slots = np.divmod(epoch * len(self) + places, self.block)
        if len(self.sizes) > 1:  # of one store its own order is order enough
            slots = self._slots.at(block, slots)
        found = np.empty_like(slots)
        stores = np.searchsorted(self._first_slot, slots, side="right") - 1
        for store in np.unique(stores):
            mine = stores == store
            drawn = block[mine] * self.quotas[store] + slots[mine] - self._first_slot[store]  # of this store, ever
            passes, place = np.divmod(drawn, self.sizes[store])
            found[mine] = self._first_window[store] + self._own[store].at(passes, place)
        return found


class ShuffledSampler(DistributedSampler[int]):
    """The training order of one rank.

    Micro-batch ``s`` of an epoch takes places ``s * B * W`` to ``(s + 1) * B * W`` of it for ``W`` ranks of ``B``
    windows each, rank ``r`` the ``r``-th part of them. So the global sequence does not depend on how many ranks share
    it, and a run goes on anywhere without replaying what was before. Windows that fill no whole optimizer step are left
    out, so that an epoch ends at the same window however a step is dealt out; which ones differs by epoch. Of fewer
    windows than a step's, an epoch is one short step of the micro-batches that they fill.

    A ``DistributedSampler``, because Lightning puts its own order in place of any other kind of sampler.

    Args:
        shuffle: The order of all windows.
        batch_size: Windows per rank and micro-batch.
        rank: This process, 0 to ``world_size - 1``.
        world_size: Number of data-parallel processes.
        start: The epoch and the micro-batch in it at which to begin; later epochs begin at their first.
        accumulate: Micro-batches per optimizer step.
    """

    def __init__(
        self,
        shuffle: ShuffledOrder,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: tuple[int, int] = (0, 0),
        accumulate: int = 1,
    ) -> None:
        super().__init__(shuffle, num_replicas=world_size, rank=rank)  # type: ignore[arg-type]  # a length will do
        self.windows = shuffle
        self.batch_size = batch_size
        self.world_size = world_size
        self.start = start
        self.accumulate = accumulate
        self.epoch = start[0]

    @property
    def micro_batches(self) -> int:
        """Micro-batches in an epoch."""
        filled = len(self.windows) // (self.batch_size * self.world_size)
        return filled // self.accumulate * self.accumulate or filled

    def __len__(self) -> int:
        """Windows of this rank in a whole epoch."""
        return self.micro_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        first = self.start[1] if epoch == self.start[0] else 0
        at_once = -(-AT_ONCE // self.batch_size)
        for begin in range(first, self.micro_batches, at_once):
            yield from self.batches(epoch, np.arange(begin, min(begin + at_once, self.micro_batches))).ravel().tolist()

    def batches(self, epoch: int, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows of this rank's micro-batches by their numbers in an epoch: (n,) -> (n, B) int64."""
        places = (numbers[:, None] * self.world_size + self.rank) * self.batch_size + np.arange(self.batch_size)
        return self.windows.windows(epoch, places.ravel()).reshape(places.shape)


class EvaluationSampler(DistributedSampler[int]):
    """Validation: all windows once, dealt out to the ranks in whole batches.

    What is missing to whole batches, the same number on every rank, is filled with the index behind the last
    window, which stands for a window without labels: batches keep one shape, and nothing is scored twice.

    Args:
        n_windows: Windows in the corpus.
        batch_size: Windows per rank and step.
        rank: This process.
        world_size: Number of data-parallel processes.
    """

    def __init__(self, n_windows: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(n_windows), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]  # a length will do
        self.n_windows = n_windows
        self.per_rank = -(-n_windows // (batch_size * world_size)) * batch_size
        self.world_size = world_size

    def __len__(self) -> int:
        return self.per_rank

    def __iter__(self) -> Iterator[int]:
        for place in range(self.per_rank):
            yield min(place * self.world_size + self.rank, self.n_windows)


def _shares(length: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to ``length``, as the weights: rounded down, the rest to the largest remainders."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * length
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: length - shares.sum()]] += 1
    found: list[int] = shares.tolist()
    return found


ROUNDS: Final = 8
FEWEST_BITS: Final = 6
"""With fewer, not all orders of a handful of values come up equally often."""
LARGEST: Final = 2**62

Words = NDArray[np.uint64]


class Permutations:
    """Random-looking bijections of 0 to ``n - 1``, numbered, of which any part can be had at once, in no memory.

    A Feistel network over at least the bits that ``n`` fits in permutes all values of so many bits; one that falls
    outside 0 to ``n - 1`` is permuted again until it is inside, which keeps it a bijection (cycle walking; Black and
    Rogaway 2002, Ciphers with Arbitrary Finite Domains, https://doi.org/10.1007/3-540-45760-7_9).

    Args:
        n: Length, 1 to 2**62.
        key: Two whole numbers of 0 or more, as a seed and a purpose. Bijections of another key or another number have
            nothing to do with each other.
    """

    def __init__(self, n: int, key: tuple[int, int]) -> None:
        assert 1 <= n <= LARGEST, n
        self.n = n
        bits = max(FEWEST_BITS, (n - 1).bit_length())
        self._left, self._right = bits // 2, bits - bits // 2
        self._keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def at(self, number: NDArray[np.int64] | int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at some places.

        Args:
            number: Of the bijection, one for all places or (m,) for each.
            places: (m,), each 0 to ``n - 1``.

        Returns:
            (m,), each 0 to ``n - 1``.
        """
        numbers = np.asarray(number, dtype=np.uint64)
        if numbers.size and (numbers == numbers.flat[0]).all():  # the rule, and half of the time
            numbers = numbers.flat[:1]
        keys = _mix(self._keys[:, None] + numbers * np.uint64(0x9E3779B97F4A7C15))  # (ROUNDS, m or 1)
        values = self._once(keys, places.astype(np.uint64))
        while (outside := np.flatnonzero(values >= self.n)).size:
            values[outside] = self._once(keys[:, outside] if keys.shape[1] > 1 else keys, values[outside])
        return values.astype(np.int64)

    def _once(self, keys: Words, values: Words) -> Words:
        """The network: each round trades the halves and hides one behind a hash of the other."""
        a, b = np.uint64(self._left), np.uint64(self._right)
        left, right = values >> b, values & _mask(b)
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & _mask(a))
            a, b = b, a
        return left << b | right


def _mask(bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << bits) - np.uint64(1)


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every bit in depends on every bit out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
