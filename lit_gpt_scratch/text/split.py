"""Which documents are for training and which are for validation."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

NEAR_DUPLICATE: Final = 0.5
"""Two documents that share this much of their five-word shingles (Jaccard) are near-duplicates."""
PERMUTATIONS: Final = 128
BANDS: Final = 32
ROWS: Final = PERMUTATIONS // BANDS
CHUNK_DOCUMENTS: Final = 4096
MAX_CANDIDATES: Final = 1024
"""Documents that one is compared with in a band: thousands may agree in one, all of them only some boilerplate."""


@dataclass(frozen=True)
class TrainValidationSplit:
    """The side of every document of a corpus, by its place.

    Attributes:
        validation: True for the documents that are held out, (n,) bool.
        cut: Where the corpus cannot be divided by document (it is a single text): the share of each
            document's end that is held out instead, else None.
    """

    validation: NDArray[np.bool_]
    cut: float | None

    def parts(self, place: int, text: str) -> tuple[str, str]:
        """The training text and the validation text of one document; either may be empty."""
        if self.cut is not None:
            border = int(len(text) * (1 - self.cut))
            return text[:border], text[border:]
        return ("", text) if self.validation[place] else (text, "")


def split_by_cluster(keys: NDArray[np.uint64], families: NDArray[np.int64], share: float) -> TrainValidationSplit:
    """Hold out about ``share`` of the documents, whole families of near-duplicates together.

    A family goes to the side that a hash of its first content says, so the side of a document does not
    depend on the order of files, on their names or on what else is in the corpus, but for its own near
    copies. The family with the smallest hash is always held out, the one with the largest never; a corpus
    that is one family is cut within its documents.

    Args:
        keys: A hash of each document's content, (n,).
        families: A number for each document that it shares with its near-duplicates, (n,).
        share: Between 0 and 1.
    """
    names, family = np.unique(families, return_inverse=True)
    if len(names) < 2:
        return TrainValidationSplit(np.zeros(len(keys), dtype=bool), share)
    least = np.full(len(names), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(least, family, keys)
    held_out = least / 2.0**64 < share
    held_out[least.argmin()] = True
    held_out[least.argmax()] = False
    return TrainValidationSplit(held_out[family], None)


class DuplicateClusters:
    """Chains of near-duplicates, found by MinHash and locality-sensitive hashing, with the signatures on disk.

    Args:
        folder: Where to put them; 768 bytes a document.
    """

    def __init__(self, folder: Path) -> None:
        self._signatures = (folder / "signatures").open("w+b")
        self._bands = (folder / "bands").open("w+b")
        self._pending: list[NDArray[np.uint32]] = []
        self.n_documents = 0

    def add(self, signature: NDArray[np.uint32]) -> None:
        """The next document's signature, (PERMUTATIONS,)."""
        self._pending.append(signature)
        self.n_documents += 1
        if len(self._pending) == CHUNK_DOCUMENTS:
            self._write()

    def link(self) -> NDArray[np.int64]:
        """For each document the first one of those it is linked to by a chain of near-duplicates, (n,)."""
        self._write()
        first = np.arange(self.n_documents)
        for band in range(BANDS if self.n_documents else 0):
            for members in self._agreeing(band, first):
                self._join(members, first)
            while (first[first] != first).any():
                first = first[first]
        return first

    def close(self) -> None:
        """Let go of the files."""
        self._signatures.close()
        self._bands.close()

    def _write(self) -> None:
        found = np.array(self._pending, dtype=np.uint32).reshape(-1, PERMUTATIONS)
        found.tofile(self._signatures)
        bands = np.zeros((BANDS, len(found)), dtype=np.uint64)  # one after the other: they are read so
        for place in range(ROWS):
            bands = (bands ^ found.reshape(-1, BANDS, ROWS)[:, :, place].T) * np.uint64(0x9E3779B97F4A7C15)
            bands ^= bands >> np.uint64(29)
        bands.tofile(self._bands)
        self._pending.clear()

    def _agreeing(self, band: int, first: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Groups of documents that agree in a band of their signatures, and are not all linked yet."""
        parts, start = [np.zeros(0, dtype=np.uint64)], 0
        while start < self.n_documents:
            n = min(CHUNK_DOCUMENTS, self.n_documents - start)
            self._bands.seek(8 * (BANDS * start + band * n))
            parts.append(np.fromfile(self._bands, dtype=np.uint64, count=n))
            start += n
        codes = np.concatenate(parts)
        order = np.argsort(codes, kind="stable")
        borders = np.flatnonzero(np.diff(codes[order]) != 0) + 1
        starts, ends = np.append(0, borders), np.append(borders, len(codes))
        heads = first[order]
        apart = np.minimum.reduceat(heads, starts) != np.maximum.reduceat(heads, starts)
        for group in np.flatnonzero(apart):
            yield order[starts[group] : ends[group]]

    def _join(self, members: NDArray[np.int64], first: NDArray[np.int64]) -> None:
        """Link those of a group that are near-duplicates, and not linked yet."""
        heads = np.array([_head(first, member) for member in members])
        signatures = np.stack([self._signature(member) for member in members])  # (m, PERMUTATIONS)
        for place in range(len(members) - 1):
            others = place + 1 + np.flatnonzero(heads[place + 1 : place + 1 + MAX_CANDIDATES] != heads[place])
            near = others[(signatures[others] == signatures[place]).mean(axis=1) >= NEAR_DUPLICATE]
            if len(near):
                joined = np.isin(heads, [*heads[near], heads[place]])
                least = heads[joined].min()
                first[heads[joined]] = least
                heads[joined] = least

    def _signature(self, place: int) -> NDArray[np.uint32]:
        self._signatures.seek(4 * PERMUTATIONS * int(place))
        return np.fromfile(self._signatures, dtype=np.uint32, count=PERMUTATIONS)


def _head(first: NDArray[np.int64], place: int) -> int:
    while first[place] != place:
        place = first[place]
    return int(place)
