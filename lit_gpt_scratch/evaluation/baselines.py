"""What a text costs without a language model: the bars that any model has to clear."""

import lzma
from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.unsignedinteger[Any]]

PAIRS_PER_CHUNK = 1_000_000
"""Validation pairs that are looked up at once: some 100 MB of memory, however long the text."""

MAX_TRAINING_TOKENS = 16_000_000
"""Training tokens that are counted at most: more would hardly sharpen the counts, but cost memory and time."""


def measure_xz_bits_per_byte(text: str) -> float:
    """Bits per byte of the text under ``xz -9``, the general-purpose compressor to beat."""
    data = text.encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def count_uniform_bits(validation: TokenIds, vocab_size: int) -> float:
    """Bits of the validation tokens, the first excepted, when all are equally likely."""
    return (len(validation) - 1) * float(np.log2(vocab_size))


def count_unigram_bits(train: TokenIds, validation: TokenIds, vocab_size: int) -> float:
    """Bits of the validation tokens, the first excepted, under their frequency in training (add-one smoothing)."""
    return float(
        -np.log2(_unigram_probabilities(train, vocab_size)) @ np.bincount(validation[1:], minlength=vocab_size)
    )


def count_bigram_bits(train: TokenIds, validation: TokenIds, vocab_size: int) -> float:
    """Bits of the validation tokens, the first excepted, each given the one before it.

    Pair counts are interpolated with the unigram by Witten-Bell smoothing (https://arxiv.org/abs/cmp-lg/9606011,
    section 2.5): after a token that has been followed by many different ones, the next may well be new too.

        P(b | a) = (count(a b) + followers(a) P(b)) / (count(a) + followers(a))
    """
    pairs, counts = np.unique(_pair_ids(train, vocab_size), return_counts=True)
    first = pairs // vocab_size
    followers = np.bincount(first, minlength=vocab_size)
    total = np.bincount(first, weights=counts, minlength=vocab_size)
    unigrams = _unigram_probabilities(train, vocab_size)
    bits = 0.0
    for start in range(0, len(validation) - 1, PAIRS_PER_CHUNK):
        asked = _pair_ids(validation[start : start + PAIRS_PER_CHUNK + 1], vocab_size)
        place = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
        count = np.where(pairs[place] == asked, counts[place], 0)
        a, b = asked // vocab_size, asked % vocab_size
        seen = total[a] + followers[a]
        probability = np.where(seen > 0, (count + followers[a] * unigrams[b]) / np.maximum(seen, 1), unigrams[b])
        bits -= float(np.log2(probability).sum())
    return bits


def compute_token_baselines(train: TokenIds, validation: TokenIds, vocab_size: int, n_bytes: int) -> dict[str, float]:
    """Bits per byte of the validation text under counts of tokens.

    Args:
        train: (n,) ids of the training; ``MAX_TRAINING_TOKENS`` of them are enough.
        validation: (m,) ids of the validation stream; as for the model, all but the first are predicted.
        vocab_size: Number of ids.
        n_bytes: UTF-8 bytes of the validation text.
    """
    return {
        "uniform": count_uniform_bits(validation, vocab_size) / n_bytes,
        "unigram": count_unigram_bits(train, validation, vocab_size) / n_bytes,
        "bigram": count_bigram_bits(train, validation, vocab_size) / n_bytes,
    }


def _unigram_probabilities(train: TokenIds, vocab_size: int) -> NDArray[np.float64]:
    counts = np.bincount(train, minlength=vocab_size) + 1
    share: NDArray[np.float64] = counts / counts.sum()
    return share


def _pair_ids(ids: TokenIds, vocab_size: int) -> TokenIds:
    """Every pair of neighbours as one number: first * vocab_size + second, (n - 1,); sorting is faster in 32 bits."""
    wide: TokenIds = ids.astype(np.uint32 if vocab_size <= 2**16 else np.uint64)
    return wide[:-1] * vocab_size + wide[1:]
