"""How much of a text comes again."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

PASSAGE_LENGTH: Final = 32
"""Tokens of a passage that is no coincidence."""
HASH_BASE: Final = 0x9E3779B97F4A7C15
"""Any large odd number."""
PHRASE_LENGTH: Final = 4
"""Words of a phrase, in what a model writes."""


def repeated_passage_share(ids: NDArray[Any]) -> float:
    """Of the passages of ``PASSAGE_LENGTH`` tokens in a text, the share that stood there before.

    Args:
        ids: (n,) integers.

    Returns:
        Between 0 and 1; 0 of a text shorter than a passage. Passages are compared by a hash of 64 bits.
    """
    n = len(ids) - PASSAGE_LENGTH + 1
    if n < 2:
        return 0.0
    # Numbers of their own for tokens, so that what ids have in common is not seen in their sums.
    drawn = np.random.default_rng(0).integers(1, 2**63, int(ids.max()) + 1, dtype=np.uint64)
    # Rabin and Karp's hash, with sums so far in the place of a loop; all of it modulo 2^64, in which what is odd can be
    # divided by.
    powers = np.cumprod(np.full(len(ids), HASH_BASE, np.uint64))
    inverse = np.cumprod(np.full(n, pow(HASH_BASE, -1, 2**64), np.uint64))
    sums = np.cumsum(drawn[np.asarray(ids, np.int64)] * powers)
    hashes = (sums[PASSAGE_LENGTH - 1 :] - np.concatenate([np.zeros(1, np.uint64), sums[: n - 1]])) * inverse
    hashes.sort()  # several times as fast as what finds the different ones by a table
    return float(np.count_nonzero(hashes[1:] == hashes[:-1])) / n


def repeated_phrase_share(text: str) -> float:
    """Of the phrases of ``PHRASE_LENGTH`` words, the share that occurred before; 0 for fewer than 8 words."""
    words = text.split()
    phrases = [tuple(words[place : place + PHRASE_LENGTH]) for place in range(len(words) - PHRASE_LENGTH + 1)]
    return 1 - len(set(phrases)) / len(phrases) if len(words) >= 2 * PHRASE_LENGTH else 0.0
