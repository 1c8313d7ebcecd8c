"""Baselines against counts by hand."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from lit_gpt_scratch.evaluation import baselines
from lit_gpt_scratch.evaluation.baselines import (
    compute_token_baselines,
    count_bigram_bits,
    count_uniform_bits,
    count_unigram_bits,
    measure_xz_bits_per_byte,
)
from tests.conftest import sentences

V = 7
rng = np.random.default_rng(0)
TRAIN = rng.choice(V - 1, size=200, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]).astype(np.uint16)  # id 6 never occurs
VALIDATION = rng.integers(0, V, size=60).astype(np.uint16)


def witten_bell(a: int, b: int) -> float:
    tokens = TRAIN.tolist()
    pairs = Counter(pairwise(tokens))
    unigram = (tokens.count(b) + 1) / (len(tokens) + V)
    count_a = sum(n for (first, _), n in pairs.items() if first == a)
    followers = len({second for first, second in pairs if first == a})
    return (pairs[a, b] + followers * unigram) / (count_a + followers) if count_a else unigram


def test_unigram_against_counts_by_hand() -> None:
    tokens = TRAIN.tolist()
    expected = -sum(math.log2((tokens.count(b) + 1) / (len(tokens) + V)) for b in VALIDATION[1:].tolist())
    assert count_unigram_bits(TRAIN, VALIDATION, V) == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [1, 7, 59, 1000])
def test_bigram_against_counts_by_hand(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(baselines, "PAIRS_PER_CHUNK", chunk)
    ids = VALIDATION.tolist()
    expected = -sum(math.log2(witten_bell(a, b)) for a, b in pairwise(ids))
    assert count_bigram_bits(TRAIN, VALIDATION, V) == pytest.approx(expected)


@pytest.mark.parametrize("a", range(V))
def test_bigram_probabilities_sum_to_one(a: int) -> None:
    bits = [count_bigram_bits(TRAIN, np.array([a, b], dtype=np.uint16), V) for b in range(V)]
    assert sum(2.0**-b for b in bits) == pytest.approx(1.0)


def test_baselines_are_per_byte_and_skip_the_first_token() -> None:
    figures = compute_token_baselines(TRAIN, VALIDATION, V, n_bytes=100)
    assert figures["uniform"] == pytest.approx(59 * math.log2(V) / 100)
    assert list(figures) == ["uniform", "unigram", "bigram"]
    assert count_uniform_bits(VALIDATION, V) == pytest.approx(59 * math.log2(V))


def test_bits_decrease_from_uniform_to_unigram_to_bigram() -> None:
    ids = np.frombuffer((sentences(1) * 3).encode(), dtype=np.uint8).astype(np.uint16)
    figures = compute_token_baselines(ids[:-1000], ids[-1000:], 257, 1000)
    assert figures["uniform"] > figures["unigram"] > figures["bigram"] > 0


def test_xz_in_bits_per_byte() -> None:
    assert measure_xz_bits_per_byte("a" * 100_000, 100_000) < 0.05
    once, ten_times = (measure_xz_bits_per_byte(text, len(text)) for text in (sentences(0), sentences(0) * 10))
    assert once > ten_times
    assert measure_xz_bits_per_byte(sentences(0), 2 * len(sentences(0))) == once / 2
