"""Removal of exact duplicates with SHA-256 and of near-duplicates with MinHash and locality-sensitive hashing."""

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
"""Number of shingles hashed at a time."""
MIN_RECALL: Final = 0.95
"""Minimum expected recall of locality-sensitive hashing for document pairs at the similarity threshold."""
MAX_CANDIDATES: Final = 1024
"""Maximum number of candidates compared with a document; thousands of documents with boilerplate may share a band.

The cleaning report states how many documents were not compared with all of their candidates.
"""


def sha256_text(text: str) -> bytes:
    """Return the SHA-256 digest of a string encoded as UTF-8."""
    return hashlib.sha256(text.encode()).digest()


def minhash_signature(text: str, permutations: int) -> RMinHash:
    """Compute a MinHash signature from the overlapping five-word shingles of a string (Broder 1997).

    The fraction of positions at which two signatures agree estimates the Jaccard similarity of the shingle sets.
    """
    words = text.split()
    minhash = RMinHash(num_perm=permutations, seed=0)
    for start in range(0, max(len(words) - SHINGLE_WORDS + 1, 1), SHINGLES_PER_UPDATE):  # chunks bound the memory usage
        chunk = words[start : start + SHINGLES_PER_UPDATE + SHINGLE_WORDS - 1]
        shingles = zip(*(islice(chunk, i, None) for i in range(SHINGLE_WORDS)), strict=False)
        minhash.update(list({" ".join(shingle) for shingle in shingles}) or [" ".join(chunk)])
    return minhash


@dataclass(frozen=True)
class ExactDuplicates(DeduplicationStep):
    """Cleaning step that removes every document whose text is identical to that of an earlier document.

    The hashes of all earlier documents are stored on disk.
    """

    cheap: ClassVar[bool] = True

    def sketch(self, document: Document) -> bytes:
        """Return the first half of the SHA-256 digest of the text.

        For 10^12 documents, the probability of a collision is about 10^-15.
        """
        return sha256_text(document.text)[:16]

    @contextmanager
    def build_filter(self, folder: Path) -> Iterator[Callable[[bytes], RejectionReason | None]]:
        """Yield a filter that rejects repeated digests; all digests are stored in an SQLite table in ``folder``."""
        database = sqlite3.connect(Path(tempfile.mkdtemp(dir=folder), "seen.sqlite"), isolation_level=None)
        database.executescript(
            "pragma journal_mode = off; pragma synchronous = off; pragma cache_size = -65536;"
            "create table seen (digest blob primary key) without rowid; begin;"
        )
        cursor = database.cursor()

        def find_duplicate(sketch: bytes) -> RejectionReason | None:
            inserted = cursor.execute("insert or ignore into seen values (?)", (sketch,)).rowcount
            return None if inserted else "exact duplicate"

        with closing(database):
            yield find_duplicate


@dataclass(frozen=True)
class NearDuplicates(DeduplicationStep):
    """Cleaning step that removes every document that is a near-duplicate of an earlier document.

    The similarity of two documents is estimated with MinHash and locality-sensitive hashing (Broder 1997; Lee et al.,
    https://arxiv.org/abs/2107.06499). The standard error of the estimate is at most 1 / (2 sqrt(permutations)). The
    step uses about 5.3 kB of memory per document.

    Args:
        similarity: Similarity threshold in (0, 1]: two documents are near-duplicates if the estimated Jaccard
            similarity of their sets of five-word shingles is at least this value.
        permutations: Number of hash values per signature; must be a multiple of ``bands``.
        bands: Number of bands per signature; two documents are compared if at least one of their bands is identical.
    """

    similarity: float = 0.775
    permutations: int = 256
    bands: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= 1:
            raise UserError(f"data.cleaning: NearDuplicates.similarity is {self.similarity}; it must be in (0, 1]")
        if self.bands < 1 or self.permutations < 1 or self.permutations % self.bands:
            raise UserError(
                f"data.cleaning: NearDuplicates.permutations is {self.permutations} and bands is {self.bands}; "
                "permutations must be a positive multiple of bands"
            )
        recall = 1 - (1 - self.similarity ** (self.permutations // self.bands)) ** self.bands
        if recall < MIN_RECALL:
            raise UserError(
                f"data.cleaning: NearDuplicates.similarity is {self.similarity}, but with {self.bands} bands, only "
                f"{recall:.0%} of the pairs with this similarity would be found; raise NearDuplicates.bands"
            )

    def sketch(self, document: Document) -> RMinHash:
        """Return the document's MinHash signature."""
        return minhash_signature(document.text, self.permutations)

    @contextmanager
    def build_filter(self, folder: Path) -> Iterator[Callable[[RMinHash], RejectionReason | None]]:
        """Yield a filter that rejects the signatures of near-duplicates."""
        yield NearDuplicateFilter(self)


class NearDuplicateFilter:
    """Filter that rejects a signature if a kept signature that shares a band with it is similar enough."""

    def __init__(self, step: NearDuplicates) -> None:
        self._similarity = step.similarity
        self._index = RMinHashLSH(threshold=step.similarity, num_perm=step.permutations, num_bands=step.bands)
        self._kept: list[RMinHash] = []
        self._n_truncated = 0

    def __call__(self, sketch: RMinHash) -> RejectionReason | None:
        """Return the reason for rejecting a document, or None to keep it."""
        candidates = self._index.query(sketch)
        if any(sketch.jaccard(self._kept[kept]) >= self._similarity for kept in candidates[:MAX_CANDIDATES]):
            return "near duplicate"
        self._n_truncated += len(candidates) > MAX_CANDIDATES
        self._index.insert(len(self._kept), sketch)
        self._kept.append(sketch)
        return None

    @property
    def remarks(self) -> list[str]:
        """Remark on the number of kept documents that were not compared with all of their candidates."""
        if not self._n_truncated:
            return []
        return [
            f"NearDuplicates compared {self._n_truncated:,} of the documents that it kept with only "
            f"{MAX_CANDIDATES:,} of the documents that share a band of their MinHash signatures, so some of them may "
            "be near-duplicates; remove passages that many documents share"
        ]
