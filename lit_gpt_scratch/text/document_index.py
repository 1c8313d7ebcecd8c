"""What is remembered of each cleaned document until all have been seen, and what follows from all."""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.cleaning_pipeline import PipelineItem
from lit_gpt_scratch.text.document import Document
from lit_gpt_scratch.text.duplicates import minhash_signature, sha256_text
from lit_gpt_scratch.text.split import PERMUTATIONS, DuplicateClusters, TrainValidationSplit, split_by_cluster


class DocumentIndex:
    """What is known of each cleaned document: 26 bytes of memory, and its signature on disk."""

    def __init__(self, scratch: Path) -> None:
        self._keys, self._picks, self._sizes, self._origins = array("Q"), array("Q"), array("L"), array("H")
        self._families = DuplicateClusters(scratch)

    @property
    def n_documents(self) -> int:
        """Documents so far."""
        return len(self._keys)

    def close(self) -> None:
        """Let go of what lies on disk."""
        self._families.close()

    def add(self, passage: PipelineItem) -> None:
        """The next document."""
        content, minima = passage.sketch
        self._keys.append(int.from_bytes(content[:8], "big"))
        self._picks.append(int.from_bytes(content[8:16], "big"))
        self._sizes.append(passage.sizes[-1])
        self._origins.append(passage.origin)
        self._families.add(minima)

    def mixed(self, names: Sequence[str], weights: Sequence[float]) -> NDArray[np.bool_]:
        """Which documents are taken so that the sources' bytes are as their weights, (n,).

        As much as the scarcest source allows, and of the others as many documents, in the order of a hash of their
        content, as come nearest to that.

        Raises:
            UserError: A source has nothing, or its documents are too large for its weight.
        """
        sizes, origins = np.array(self._sizes, dtype=np.float64), np.array(self._origins)
        there = np.array([sizes[origins == origin].sum() for origin in range(len(names))])
        for name, size in zip(names, there, strict=True):
            if not size:
                raise UserError(f"data.source: no document of {name} is left to be mixed with others")
        scale = min(there / weights)
        wanted = np.zeros(self.n_documents, dtype=bool)
        for origin, (name, weight) in enumerate(zip(names, weights, strict=True)):
            places = np.flatnonzero(origins == origin)
            places = places[np.argsort(np.array(self._picks)[places], kind="stable")]
            middles = np.cumsum(sizes[places]) - sizes[places] / 2
            wanted[places[middles <= weight * scale * (1 + 1e-9)]] = True
            if not wanted[places].any():
                raise UserError(
                    f"data.source: not one document of {name} is small enough for its weight: cut it into smaller "
                    "ones, or give it more"
                )
        return wanted

    def split(self, wanted: NDArray[np.bool_], share: float) -> TrainValidationSplit:
        """The side of every document; of one that is not wanted it means nothing."""
        parts = split_by_cluster(np.array(self._keys)[wanted], self._families.link()[wanted], share)
        validation = np.zeros(self.n_documents, dtype=bool)
        validation[wanted] = parts.validation
        return replace(parts, validation=validation)


def hash_document(document: Document) -> tuple[bytes, NDArray[np.uint32]]:
    """What the split has to know of a document that passed all steps: its digest and its signature.

    Raises:
        UserError: It has bytes that no text has.
    """
    if "\0" in document.text:
        raise UserError(
            f"{document.id} has a NUL byte, which is in no text: take it out, or add the step ControlCharacters to "
            "data.cleaning"
        )
    return sha256_text(document.text), np.array(
        minhash_signature(document.text, PERMUTATIONS).digest(), dtype=np.uint32
    )
