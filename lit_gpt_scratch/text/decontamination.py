"""Training documents that give away what is held out."""

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
    """Drop every training document that has a run of words in common with a document held out for validation.

    Words are compared without case and punctuation, as GPT-3's were (https://arxiv.org/abs/2005.14165, appendix C).
    A shorter document leaks wherever the whole of it stands, or, if it has fewer than ``least`` words, where it is all
    that stands. Remembered are 8 bytes for each word that is held out.

    Args:
        words: Words in a run.
        least: Words of a document that is looked for in others: many a shorter one is a common phrase.
    """

    words: int = 13
    least: int = 8

    def __post_init__(self) -> None:
        if self.words < 1:
            raise UserError(f"data.cleaning: Leakage.words is {self.words}; it must be at least 1")

    def judge(self, held_out: Iterable[Document]) -> Callable[[Document], RejectionReason | None]:
        """Judge by all runs of all documents that are held out."""
        known: dict[int, list[NDArray[np.uint64]]] = {}
        whole: set[tuple[str, ...]] = set()
        for document in held_out:
            words = normalized_words(document.text)
            if len(words) < min(self.least, self.words):
                whole.add(tuple(words))
            else:
                length = min(len(words), self.words)
                known.setdefault(length, []).append(hash_ngrams(hash_words(words), length))
        runs = {length: np.unique(np.concatenate(found)) for length, found in known.items()}

        def leaks(document: Document) -> RejectionReason | None:
            words = normalized_words(document.text)
            codes = hash_words(words)
            if (words and tuple(words) in whole) or any(
                _meet(hash_ngrams(codes, length), found) for length, found in runs.items()
            ):
                return "words in a row that are held out"
            return None

        return leaks


def normalized_words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return re.findall(r"\w+", text.lower())


def hash_words(words: list[str]) -> NDArray[np.uint64]:
    """A number for each word, (n,), the same for the same word."""
    return np.fromiter((zlib.crc32(word.encode()) for word in words), dtype=np.uint64, count=len(words))


def hash_ngrams(codes: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """A number for each run of so many words, (n,), the same for the same words."""
    run = np.zeros(max(len(codes) - length + 1, 0), dtype=np.uint64)
    for place in range(length):
        run = (run ^ codes[place : place + len(run)]) * np.uint64(0x9E3779B97F4A7C15)
        run ^= run >> np.uint64(29)
    return run


def _meet(found: NDArray[np.uint64], known: NDArray[np.uint64]) -> bool:
    """Whether two arrays have a number in common; ``known`` is sorted."""
    place = np.minimum(np.searchsorted(known, found), len(known) - 1)
    return bool((known[place] == found).any())
