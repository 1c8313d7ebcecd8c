"""Training documents that give away what is held out."""

import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.cleaning import HeldOutStep, Reason
from lit_gpt_scratch.text.document import Document


@dataclass(frozen=True)
class Leakage(HeldOutStep):
    """Drop every training document that has a run of words in common with a document held out for validation.

    Words are compared without case and punctuation, as GPT-3's were (https://arxiv.org/abs/2005.14165, appendix C).
    A document of fewer words leaks if it is the same from its first word to its last. Remembered are 8 bytes for each
    word that is held out.

    Args:
        words: Words in a run.
    """

    words: int = 13

    def __post_init__(self) -> None:
        if self.words < 1:
            raise UserError(f"data.cleaning: Leakage.words is {self.words}; it must be at least 1")

    def judge(self, held_out: Iterable[Document]) -> Callable[[Document], Reason | None]:
        """Judge by all runs of all documents that are held out."""
        runs = [np.zeros(0, dtype=np.uint64), *(self._runs(document) for document in held_out)]
        known = np.unique(np.concatenate(runs))

        def leaks(document: Document) -> Reason | None:
            found = self._runs(document)
            place = np.minimum(np.searchsorted(known, found), max(len(known) - 1, 0))
            shares = bool(len(known)) and bool((known[place] == found).any())
            return f"{self.words} words in a row that are held out" if shares else None

        return leaks

    def _runs(self, document: Document) -> NDArray[np.uint64]:
        """A number for each run of words, (n,), the same for the same words."""
        words = re.findall(r"\w+", document.text.lower())
        codes = np.fromiter((zlib.crc32(word.encode()) for word in words), dtype=np.uint64, count=len(words))
        if not words:
            return codes
        length = min(self.words, len(words))
        run = np.zeros(len(words) - length + 1, dtype=np.uint64)
        for place in range(length):
            run = (run ^ codes[place : place + len(run)]) * np.uint64(0x9E3779B97F4A7C15)
            run ^= run >> np.uint64(29)
        # A whole short document is no run: its length is part of it.
        return run if length == self.words else run ^ np.uint64(length)
