"""Removal of training documents that share word n-grams with validation documents (decontamination)."""

import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.cleaning import DecontaminationStep, RejectionReason
from lit_gpt_scratch.text.document import Document


@dataclass(frozen=True)
class Leakage(DecontaminationStep):
    """Cleaning step that removes every training document that shares a word n-gram with a validation document.

    Case and punctuation are ignored, as in the GPT-3 paper (https://arxiv.org/abs/2005.14165, appendix C). A validation
    document with fewer than ``words`` words is treated as a single n-gram. If it also has fewer than ``least`` words,
    it matches only training documents that consist of exactly the same words. The step uses 8 bytes of memory per word
    of the validation documents.

    Args:
        words: Length of the n-grams, in words.
        least: Minimum number of words that a validation document must have to match a part of a training document;
            shorter documents are often common phrases.
    """

    words: int = 13
    least: int = 8

    def __post_init__(self) -> None:
        if self.words < 1:
            raise UserError(f"data.cleaning: Leakage.words is {self.words}; it must be at least 1")

    def build_filter(self, held_out: Iterable[Document]) -> Callable[[Document], RejectionReason | None]:
        """Return a filter that rejects training documents that contain an n-gram of a validation document."""
        found: dict[int, list[NDArray[np.uint64]]] = {}
        whole: set[tuple[str, ...]] = set()
        for document in held_out:
            words = normalized_words(document.text)
            if len(words) < min(self.least, self.words):
                whole.add(tuple(words))
            else:
                length = min(len(words), self.words)
                found.setdefault(length, []).append(hash_ngrams(hash_words(words), length))
        ngrams = {length: np.unique(np.concatenate(hashes)) for length, hashes in found.items()}

        def find_overlap(document: Document) -> RejectionReason | None:
            words = normalized_words(document.text)
            hashes = hash_words(words)
            if (words and tuple(words) in whole) or any(
                _intersects(hash_ngrams(hashes, length), known) for length, known in ngrams.items()
            ):
                return "n-gram overlap with validation"
            return None

        return find_overlap


def normalized_words(text: str) -> list[str]:
    """Split text into lower-case words without punctuation."""
    return re.findall(r"\w+", text.lower())


def hash_words(words: list[str]) -> NDArray[np.uint64]:
    """Return a hash of each word, (n,)."""
    return np.fromiter((zlib.crc32(word.encode()) for word in words), dtype=np.uint64, count=len(words))


def hash_ngrams(word_hashes: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """Hash each n-gram of ``length`` words, given the hash of each word: (n,) -> (max(n - length + 1, 0),)."""
    hashes = np.zeros(max(len(word_hashes) - length + 1, 0), dtype=np.uint64)
    for offset in range(length):
        hashes = (hashes ^ word_hashes[offset : offset + len(hashes)]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _intersects(hashes: NDArray[np.uint64], known: NDArray[np.uint64]) -> bool:
    """Return whether two arrays have a common element; ``known`` must be sorted."""
    index = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return bool((known[index] == hashes).any())
