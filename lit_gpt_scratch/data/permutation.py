"""Shuffles that are computed, not stored."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

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
