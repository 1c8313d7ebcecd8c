"""Copies, exact and near: how they are recognised, and the steps that drop them."""

import hashlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar, Final

from rensa import RMinHash, RMinHashLSH

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.cleaning import DeduplicationStep, RejectionReason
from lit_gpt_scratch.text.document import Document

SHINGLE_WORDS: Final = 5
SHINGLES_PER_UPDATE: Final = 2**16
"""Shingles that are hashed at once."""
MIN_RECALL: Final = 0.95
"""Share of pairs of the least similarity that locality-sensitive hashing has to find."""
MAX_CANDIDATES: Final = 1024
"""Documents that one is compared with: thousands may share a band with it, all of them only some boilerplate."""


def sha256_text(text: str) -> bytes:
    """SHA-256 of a text's UTF-8."""
    return hashlib.sha256(text.encode()).digest()


def minhash_signature(text: str, permutations: int) -> RMinHash:
    """MinHash of the text's overlapping five-word shingles (Broder 1997).

    Two signatures agree at as large a share of their places, on average, as the sets of shingles overlap (Jaccard).
    """
    words = text.split()
    minhash = RMinHash(num_perm=permutations, seed=0)
    for start in range(
        0, max(len(words) - SHINGLE_WORDS + 1, 1), SHINGLES_PER_UPDATE
    ):  # a long text has more than fit in memory
        some = words[start : start + SHINGLES_PER_UPDATE + SHINGLE_WORDS - 1]
        groups = zip(*(islice(some, i, None) for i in range(SHINGLE_WORDS)), strict=False)
        minhash.update(list({" ".join(group) for group in groups}) or [" ".join(some)])
    return minhash


@dataclass(frozen=True)
class ExactDuplicates(DeduplicationStep):
    """Drop every document whose text stood there before, byte for byte. What is remembered lies on disk."""

    cheap: ClassVar[bool] = True

    def sketch(self, document: Document) -> bytes:
        """Half of a SHA-256: 10^12 documents have none in common but by a chance of 10^-15."""
        return sha256_text(document.text)[:16]

    @contextmanager
    def judge(self, folder: Path) -> Iterator[Callable[[bytes], RejectionReason | None]]:
        """Judge by digests in a table on disk, whose pages are in memory as far as they are in use."""
        database = sqlite3.connect(Path(tempfile.mkdtemp(dir=folder), "seen.sqlite"), isolation_level=None)
        database.executescript(
            "pragma journal_mode = off; pragma synchronous = off; pragma cache_size = -65536;"
            "create table seen (digest blob primary key) without rowid; begin;"
        )
        cursor = database.cursor()

        def known(sketch: bytes) -> RejectionReason | None:
            new = cursor.execute("insert or ignore into seen values (?)", (sketch,)).rowcount
            return None if new else "exact duplicate"

        with closing(database):
            yield known


@dataclass(frozen=True)
class NearDuplicates(DeduplicationStep):
    """Drop every document that is nearly the same as one before it.

    MinHash and locality-sensitive hashing (Broder 1997; Lee et al., https://arxiv.org/abs/2107.06499). The estimate's
    standard error is at most 1 / (2 sqrt(permutations)); what is remembered, some 5.3 kB a document, is in memory.

    Args:
        similarity: Estimated share of five-word shingles in common (Jaccard) from which on two are near-duplicates.
        permutations: Hashes in a signature.
        bands: Into which it is divided; two documents are compared if they agree in one of them.
    """

    similarity: float = 0.775
    permutations: int = 256
    bands: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1:
            raise UserError(f"data.cleaning: NearDuplicates.similarity is {self.similarity}; it lies in (0, 1]")
        if self.bands < 1 or self.permutations < 1 or self.permutations % self.bands:
            raise UserError(
                f"data.cleaning: NearDuplicates.permutations ({self.permutations}) must be a multiple of bands "
                f"({self.bands})"
            )
        found = 1 - (1 - self.similarity ** (self.permutations // self.bands)) ** self.bands
        if found < MIN_RECALL:
            raise UserError(
                f"data.cleaning: NearDuplicates.similarity is {self.similarity}; with {self.bands} bands only "
                f"{found:.0%} of such pairs would be compared; raise NearDuplicates.bands"
            )

    def sketch(self, document: Document) -> RMinHash:
        """The document's signature."""
        return minhash_signature(document.text, self.permutations)

    @contextmanager
    def judge(self, folder: Path) -> Iterator[Callable[[RMinHash], RejectionReason | None]]:
        """Judge by all signatures that share a band."""
        index = RMinHashLSH(threshold=self.similarity, num_perm=self.permutations, num_bands=self.bands)
        passed: list[RMinHash] = []

        def known(sketch: RMinHash) -> RejectionReason | None:
            near = islice(index.query(sketch), MAX_CANDIDATES)
            if any(sketch.jaccard(passed[place]) >= self.similarity for place in near):
                return "near duplicate"
            index.insert(len(passed), sketch)
            passed.append(sketch)
            return None

        yield known
