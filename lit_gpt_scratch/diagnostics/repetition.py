"""Measures of repetition in text."""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

PASSAGE_LENGTH: Final = 32
"""Number of tokens per passage; repetitions of this length are rarely a coincidence."""
HASH_BASE: Final = 0x9E3779B97F4A7C15
"""Base of the rolling hash; any large odd number works."""
PHRASE_LENGTH: Final = 4
"""Number of words per phrase in generated text."""


def repeated_passage_share(ids: NDArray[Any]) -> float:
    """Compute the fraction of passages of ``PASSAGE_LENGTH`` tokens that occur earlier in the text.

    Passages are compared by a 64-bit hash.

    Args:
        ids: Token ids, integer array of shape (n,).

    Returns:
        Fraction between 0 and 1; 0 if the text is shorter than a passage.
    """
    n = len(ids) - PASSAGE_LENGTH + 1
    if n < 2:
        return 0.0
    # Map each token id to a random number, so that regularities among the ids do not carry over to the sums.
    random = np.random.default_rng(0).integers(1, 2**63, int(ids.max()) + 1, dtype=np.uint64)
    # Rabin-Karp rolling hash, as a difference of prefix sums modulo 2^64, where every odd number has an inverse.
    powers = np.cumprod(np.full(len(ids), HASH_BASE, np.uint64))
    inverse = np.cumprod(np.full(n, pow(HASH_BASE, -1, 2**64), np.uint64))
    sums = np.cumsum(random[np.asarray(ids, np.int64)] * powers)
    hashes = (sums[PASSAGE_LENGTH - 1 :] - np.concatenate([np.zeros(1, np.uint64), sums[: n - 1]])) * inverse
    hashes.sort()  # several times as fast as a hash table
    return float(np.count_nonzero(hashes[1:] == hashes[:-1])) / n


def repeated_phrase_share(text: str) -> float:
    """Compute the fraction of phrases of ``PHRASE_LENGTH`` words that occur earlier in the text.

    Return 0 if the text has fewer than ``2 * PHRASE_LENGTH`` words.
    """
    words = text.split()
    phrases = [tuple(words[place : place + PHRASE_LENGTH]) for place in range(len(words) - PHRASE_LENGTH + 1)]
    return 1 - len(set(phrases)) / len(phrases) if len(words) >= 2 * PHRASE_LENGTH else 0.0
