"""Mix sources by weight, and split documents into training and validation, keeping near-duplicates together."""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.cleaning_pipeline import PipelineItem
from lit_gpt_scratch.text.document import Document
from lit_gpt_scratch.text.duplicates import minhash_signature, sha256_text

NEAR_DUPLICATE: Final = 0.5
"""Similarity threshold: two documents are near-duplicates if the estimated Jaccard similarity of their sets of
five-word shingles is at least this value."""
PERMUTATIONS: Final = 128
BANDS: Final = 32
ROWS: Final = PERMUTATIONS // BANDS
CHUNK_DOCUMENTS: Final = 4096
"""Number of signatures buffered in memory before they are written to disk."""
MAX_CANDIDATES: Final = 1024
"""Maximum number of candidates compared with a document per band; boilerplate may produce thousands of candidates."""
SHARE_TOLERANCE: Final = 1.3
"""Maximum factor by which the validation text may be larger or smaller than requested; if the factor is exceeded,
clusters are moved between the splits."""


@dataclass(frozen=True)
class TrainValidationSplit:
    """Assignment of the documents in a corpus to the training or validation split.

    Attributes:
        validation: Mask of the validation documents, bool array of shape (n,).
        tail: Fraction of each document, at its end, that is held out if all documents belong to a single cluster; None
            if whole documents are assigned to the splits.
        remarks: Sentences for the cleaning report about clusters that are too large, or that may be incomplete.
    """

    validation: NDArray[np.bool_]
    tail: float | None
    remarks: tuple[str, ...] = ()

    def split_text(self, index: int, text: str) -> tuple[str, str]:
        """Split the text of a document into training and validation text; either may be empty."""
        if self.tail is not None:
            boundary = int(len(text) * (1 - self.tail))
            return text[:boundary], text[boundary:]
        return ("", text) if self.validation[index] else (text, "")


def split_by_cluster(
    keys: NDArray[np.uint64],
    clusters: NDArray[np.int64],
    sizes: NDArray[np.integer[Any]],
    validation_share: float,
) -> TrainValidationSplit:
    """Assign documents to the training or validation split, keeping each cluster of near-duplicates together.

    A hash of the texts of a cluster determines its position between 0 and 1, and clusters whose position is below
    ``validation_share`` are held out. The assignment therefore does not depend on file names or the order of files, and
    a document rarely moves to the other split when documents are added. A few long documents or large clusters can make
    the validation text much smaller or larger than requested. Only in this case are clusters moved to the other split,
    starting with those closest to the threshold, until the size is within ``SHARE_TOLERANCE`` of the requested size.

    A cluster that is larger than the requested validation text is used for training. If all clusters are that large,
    the smallest cluster is held out. If there is only one cluster, the end of each document is held out instead.

    Args:
        keys: Content hash of each document, of shape (n,).
        clusters: Cluster id of each document, of shape (n,).
        sizes: Size of each document in bytes, of shape (n,).
        validation_share: Approximate fraction of the bytes to hold out, between 0 and 1.
    """
    ids, cluster, n_documents = np.unique(clusters, return_inverse=True, return_counts=True)
    if len(ids) < 2:
        remark = (
            f"all {len(keys):,} documents are near-duplicates of each other, so the end of each document is held out "
            "and resembles training text; add other documents"
        )
        validation = np.zeros(len(keys), dtype=bool)
        return TrainValidationSplit(validation, validation_share, (remark,) if len(keys) > 1 else ())
    n_bytes = np.bincount(cluster, weights=sizes)
    position, order = _place_clusters(keys, cluster)
    requested = validation_share * n_bytes.sum()
    held_out = np.zeros(len(ids), dtype=bool)
    held_bytes = 0.0
    for index in order[n_bytes[order] <= requested]:
        if position[index] >= validation_share and held_bytes >= requested / SHARE_TOLERANCE:
            break
        if held_bytes + n_bytes[index] <= requested * SHARE_TOLERANCE:
            held_out[index] = True
            held_bytes += n_bytes[index]
    if not held_out.any():
        held_out[order[n_bytes[order].argmin()]] = True
    if held_out.all():
        held_out[order[-1]] = False
    remarks = []
    largest = order[n_bytes[order].argmax()]
    if n_bytes[largest] > requested and n_documents[largest] > 1:
        shares = n_bytes / n_bytes.sum()
        remarks.append(
            f"{n_documents[largest]:,} documents are near-duplicates of each other and make up {shares[largest]:.1%} "
            f"of the text, more than data.validation_share ({validation_share:.1%}); they are all "
            f"{'held out' if held_out[largest] else 'used for training'}, and {shares[held_out].sum():.1%} of the text "
            "is held out; to keep only one of them, add NearDuplicates to data.cleaning"
        )
    return TrainValidationSplit(held_out[cluster], None, tuple(remarks))


def _place_clusters(
    keys: NDArray[np.uint64], cluster: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the position of each cluster, uniform between 0 and 1, and the cluster indices sorted by position.

    The smallest of k independent, uniform hashes is less than x with probability 1 - (1 - x)^k. This probability is
    used as the position, which is therefore uniform for any k, and equals the hash if the cluster is a single document.
    Comparing the smallest hash itself with the share would hold out almost all large clusters. Exact duplicates, whose
    hashes are equal, count once.
    """
    by_cluster = np.lexsort((keys, cluster))
    keys, cluster = keys[by_cluster], cluster[by_cluster]
    first = np.diff(cluster, prepend=-1) != 0
    distinct = first | (keys != np.roll(keys, 1))
    smallest = keys[first]
    position = 1 - (1 - smallest / 2.0**64) ** np.bincount(cluster[distinct])
    return position, np.lexsort((smallest, position))


class DuplicateClusters:
    """Clusters of near-duplicates, found with MinHash and locality-sensitive hashing.

    Args:
        folder: Folder in which signatures are stored; each document requires 768 bytes.
    """

    def __init__(self, folder: Path) -> None:
        self._signatures = (folder / "signatures").open("w+b")
        self._bands = (folder / "bands").open("w+b")
        self._pending: list[NDArray[np.uint32]] = []
        self.n_documents = 0
        self.n_truncated = 0
        """Number of documents that ``cluster_ids`` did not compare with all of their candidates."""

    def add(self, signature: NDArray[np.uint32]) -> None:
        """Add the MinHash signature of the next document, an array of shape (PERMUTATIONS,)."""
        self._pending.append(signature)
        self.n_documents += 1
        if len(self._pending) == CHUNK_DOCUMENTS:
            self._flush()

    def cluster_ids(self) -> NDArray[np.int64]:
        """Return the cluster id of each of n documents: the index of the first document in the cluster.

        A cluster is a connected component: its documents are linked by chains of near-duplicates.
        """
        self._flush()
        first, truncated = np.arange(self.n_documents), np.zeros(self.n_documents, dtype=bool)
        for band in range(BANDS if self.n_documents else 0):
            for members in self._candidate_groups(band, first):
                if not self._link(members, first):
                    truncated[members[: -MAX_CANDIDATES - 1]] = True
            while (first[first] != first).any():
                first = first[first]
        self.n_truncated = int(truncated.sum())
        return first

    def close(self) -> None:
        """Close the signature files."""
        self._signatures.close()
        self._bands.close()

    def _flush(self) -> None:
        signatures = np.array(self._pending, dtype=np.uint32).reshape(-1, PERMUTATIONS)
        self._signatures.write(signatures.tobytes())  # tofile() loses data silently if the disk is full
        bands = np.zeros((BANDS, len(signatures)), dtype=np.uint64)  # band-major, the order in which they are read
        for row in range(ROWS):
            bands = (bands ^ signatures.reshape(-1, BANDS, ROWS)[:, :, row].T) * np.uint64(0x9E3779B97F4A7C15)
            bands ^= bands >> np.uint64(29)
        self._bands.write(bands.tobytes())
        self._pending.clear()

    def _candidate_groups(self, band: int, first: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Yield each group of documents with the same hash in a band, unless all of them are already in one cluster."""
        chunks, start = [np.zeros(0, dtype=np.uint64)], 0
        while start < self.n_documents:
            n = min(CHUNK_DOCUMENTS, self.n_documents - start)
            self._bands.seek(8 * (BANDS * start + band * n))
            chunks.append(np.fromfile(self._bands, dtype=np.uint64, count=n))
            start += n
        hashes = np.concatenate(chunks)
        order = np.argsort(hashes, kind="stable")
        boundaries = np.flatnonzero(np.diff(hashes[order]) != 0) + 1
        starts, ends = np.append(0, boundaries), np.append(boundaries, len(hashes))
        heads = first[order]
        unlinked = np.minimum.reduceat(heads, starts) != np.maximum.reduceat(heads, starts)
        for group in np.flatnonzero(unlinked):
            yield order[starts[group] : ends[group]]

    def _link(self, members: NDArray[np.int64], first: NDArray[np.int64]) -> bool:
        """Compare the candidates in a group, and merge the clusters of near-duplicates.

        Returns:
            Whether each pair of documents was compared or is in the same cluster.
        """
        heads = np.array([_find_head(first, member) for member in members])
        signatures = np.stack([self._read_signature(member) for member in members])  # (m, PERMUTATIONS)
        for i in range(len(members) - 1):
            others = i + 1 + np.flatnonzero(heads[i + 1 : i + 1 + MAX_CANDIDATES] != heads[i])
            near = others[(signatures[others] == signatures[i]).mean(axis=1) >= NEAR_DUPLICATE]
            if len(near):
                joined = np.isin(heads, [*heads[near], heads[i]])
                smallest = heads[joined].min()
                first[heads[joined]] = smallest
                heads[joined] = smallest
        return len(members) <= MAX_CANDIDATES + 1 or bool((heads == heads[0]).all())

    def _read_signature(self, index: int) -> NDArray[np.uint32]:
        self._signatures.seek(4 * PERMUTATIONS * int(index))
        return np.fromfile(self._signatures, dtype=np.uint32, count=PERMUTATIONS)


def _find_head(first: NDArray[np.int64], index: int) -> int:
    while first[index] != index:
        index = first[index]
    return int(index)


class DocumentIndex:
    """Index of all cleaned documents for mixing and splitting.

    Each document uses 26 bytes of memory, and its signature is stored on disk.
    """

    def __init__(self, folder: Path) -> None:
        self._split_keys, self._mixing_keys = array("Q"), array("Q")
        self._sizes, self._sources = array("L"), array("H")
        self._clusters = DuplicateClusters(folder)

    @property
    def n_documents(self) -> int:
        """Number of documents added so far."""
        return len(self._split_keys)

    def close(self) -> None:
        """Close the signature files."""
        self._clusters.close()

    def add(self, item: PipelineItem) -> None:
        """Add the next document; its sketch must be the result of ``hash_document``."""
        content_hash, signature = item.sketch
        self._split_keys.append(int.from_bytes(content_hash[:8], "big"))
        self._mixing_keys.append(int.from_bytes(content_hash[8:16], "big"))
        self._sizes.append(item.sizes[-1])
        self._sources.append(item.source_index)
        self._clusters.add(signature)

    def select_by_weight(self, names: Sequence[str], weights: Sequence[float]) -> NDArray[np.bool_]:
        """Return a mask of documents selected so that the bytes per source are proportional to the weights.

        All documents of the source with the fewest bytes relative to its weight are selected. From every other source,
        documents are selected in order of their content hashes until their total size is as close as possible to the
        size implied by the source's weight.

        Raises:
            UserError: A source has no documents, or its weight is too low to include any of its documents.
        """
        sizes, sources = np.array(self._sizes, dtype=np.float64), np.array(self._sources)
        available = np.array([sizes[sources == source].sum() for source in range(len(names))])
        for name, size in zip(names, available, strict=True):
            if not size:
                raise UserError(
                    f"data.source: no documents of {name} are left after cleaning; remove the source, or change the "
                    "steps in data.cleaning"
                )
        scale = min(available / weights)
        selected = np.zeros(self.n_documents, dtype=bool)
        for source, (name, weight) in enumerate(zip(names, weights, strict=True)):
            indices = np.flatnonzero(sources == source)
            indices = indices[np.argsort(np.array(self._mixing_keys)[indices], kind="stable")]
            midpoints = np.cumsum(sizes[indices]) - sizes[indices] / 2
            selected[indices[midpoints <= weight * scale * (1 + 1e-9)]] = True
            if not selected[indices].any():
                raise UserError(
                    f"data.source: the weight of {name} is too low to include any of its documents; split the "
                    "documents, or raise the weight"
                )
        return selected

    def split(self, selected: NDArray[np.bool_], validation_share: float) -> TrainValidationSplit:
        """Split the selected documents into training and validation documents.

        In the result, ``validation`` is False for all documents that are not selected.
        """
        parts = split_by_cluster(
            np.array(self._split_keys)[selected],
            self._clusters.cluster_ids()[selected],
            np.array(self._sizes)[selected],
            validation_share,
        )
        validation = np.zeros(self.n_documents, dtype=bool)
        validation[selected] = parts.validation
        remarks = list(parts.remarks)
        if n := self._clusters.n_truncated:
            remarks.append(
                f"{n:,} documents were compared with only {MAX_CANDIDATES:,} of the documents that share a band of "
                "their MinHash signatures, so near-duplicates of them may be in the other split; remove passages that "
                "many documents share"
            )
        return replace(parts, validation=validation, remarks=tuple(remarks))


def hash_document(document: Document) -> tuple[bytes, NDArray[np.uint32]]:
    """Return the SHA-256 digest and MinHash signature of a cleaned document, for ``DocumentIndex``.

    Raises:
        UserError: The text contains a NUL byte.
    """
    if "\0" in document.text:
        raise UserError(
            f"{document.id} contains a NUL byte; remove the byte, or add the cleaning step ControlCharacters to "
            "data.cleaning"
        )
    signature = np.array(minhash_signature(document.text, PERMUTATIONS).digest(), dtype=np.uint32)
    return sha256_text(document.text), signature
