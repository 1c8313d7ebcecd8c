"""Compute bits-per-byte baselines without a neural network: xz compression, and uniform, unigram and bigram models."""

import lzma
from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.unsignedinteger[Any]]

PAIRS_PER_CHUNK = 1_000_000
"""Maximum number of validation token pairs to process at once, which limits the memory to about 100 MB."""

MAX_TRAINING_TOKENS = 16_000_000
"""Maximum number of training tokens to count. More tokens cost memory and time, but hardly improve the estimate."""


def measure_xz_bits_per_byte(tokens_text: str, n_bytes: int) -> float:
    """Return the bits per byte of a text compressed with ``xz -9``, a strong compressor.

    Args:
        tokens_text: Text decoded from the tokens; it differs from the original text if the tokenizer is lossy.
        n_bytes: Size of the original text in UTF-8 bytes.
    """
    return 8 * len(lzma.compress(tokens_text.encode(), preset=9)) / n_bytes


def count_uniform_bits(validation: TokenIds, vocab_size: int) -> float:
    """Return the number of bits that a uniform model requires to encode all validation tokens except the first."""
    return (len(validation) - 1) * float(np.log2(vocab_size))


def count_unigram_bits(train: TokenIds, validation: TokenIds, vocab_size: int) -> float:
    """Return the number of bits that a unigram model requires to encode all validation tokens except the first.

    The unigram counts of the training tokens are smoothed by adding one.
    """
    return float(
        -np.log2(_unigram_probabilities(train, vocab_size)) @ np.bincount(validation[1:], minlength=vocab_size)
    )


def count_bigram_bits(train: TokenIds, validation: TokenIds, vocab_size: int) -> float:
    """Return the number of bits that a bigram model requires to encode all validation tokens except the first.

    Pair counts are interpolated with unigram probabilities by Witten-Bell smoothing
    (https://arxiv.org/abs/cmp-lg/9606011, section 2.5). The more distinct tokens follow ``a`` in the training data, the
    greater the weight of the unigram probability.

        P(b | a) = (count(a b) + followers(a) P(b)) / (count(a) + followers(a))
    """
    pairs, counts = np.unique(_pair_ids(train, vocab_size), return_counts=True)
    first = pairs // vocab_size
    followers = np.bincount(first, minlength=vocab_size)
    total = np.bincount(first, weights=counts, minlength=vocab_size)
    unigrams = _unigram_probabilities(train, vocab_size)
    bits = 0.0
    for start in range(0, len(validation) - 1, PAIRS_PER_CHUNK):
        chunk = _pair_ids(validation[start : start + PAIRS_PER_CHUNK + 1], vocab_size)
        index = np.minimum(np.searchsorted(pairs, chunk), len(pairs) - 1)
        count = np.where(pairs[index] == chunk, counts[index], 0)
        a, b = chunk // vocab_size, chunk % vocab_size
        seen = total[a] + followers[a]
        probability = np.where(seen > 0, (count + followers[a] * unigrams[b]) / np.maximum(seen, 1), unigrams[b])
        bits -= float(np.log2(probability).sum())
    return bits


def compute_token_baselines(train: TokenIds, validation: TokenIds, vocab_size: int, n_bytes: int) -> dict[str, float]:
    """Compute the bits per byte of the validation text for a uniform, a unigram and a bigram model.

    Args:
        train: Training token ids, of shape (n,); ``MAX_TRAINING_TOKENS`` ids are enough.
        validation: Validation token ids, of shape (m,). All tokens except the first are predicted.
        vocab_size: Size of the vocabulary.
        n_bytes: Size of the validation text in UTF-8 bytes.

    Returns:
        Bits per byte of each model, with the keys ``uniform``, ``unigram`` and ``bigram``.
    """
    return {
        "uniform": count_uniform_bits(validation, vocab_size) / n_bytes,
        "unigram": count_unigram_bits(train, validation, vocab_size) / n_bytes,
        "bigram": count_bigram_bits(train, validation, vocab_size) / n_bytes,
    }


def _unigram_probabilities(train: TokenIds, vocab_size: int) -> NDArray[np.float64]:
    counts = np.bincount(train, minlength=vocab_size) + 1
    probabilities: NDArray[np.float64] = counts / counts.sum()
    return probabilities


def _pair_ids(ids: TokenIds, vocab_size: int) -> TokenIds:
    """Encode each pair of adjacent tokens as an integer ``first * vocab_size + second``.

    32-bit integers are used if possible, because they are sorted faster.
    """
    wide: TokenIds = ids.astype(np.uint32 if vocab_size <= 2**16 else np.uint64)
    return wide[:-1] * vocab_size + wide[1:]
