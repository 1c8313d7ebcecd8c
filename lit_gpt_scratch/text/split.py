"""Which documents are for training and which are for validation."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from rensa import RMinHash, RMinHashLSH

from lit_gpt_scratch.text.sources import Document

SHINGLE_WORDS = 5
NEAR_DUPLICATE = 0.5
"""Two documents that share this much of their five-word shingles (Jaccard) are near-duplicates."""
PERMUTATIONS, BANDS = 128, 32


@dataclass(frozen=True)
class Split:
    """The side of every document of a corpus, by its place in the source's order.

    Attributes:
        validation: Places of the documents that are held out.
        duplicates: Places of exact copies of an earlier document, used nowhere.
        cut: Where the corpus cannot be divided by document (it is a single text): the share of each
            document's end that is held out instead, else None.
        fingerprint: SHA-256 over ids and contents; the corpus changed if it did.
        n_bytes: UTF-8 bytes of all documents.
    """

    validation: frozenset[int]
    duplicates: frozenset[int]
    cut: float | None
    fingerprint: str
    n_bytes: int

    def parts(self, place: int, document: Document) -> tuple[str, str]:
        """The training text and the validation text of one document; either may be empty."""
        if place in self.duplicates:
            return "", ""
        if self.cut is not None:
            border = int(len(document.text) * (1 - self.cut))
            return document.text[:border], document.text[border:]
        return ("", document.text) if place in self.validation else (document.text, "")


def split(corpus: Iterable[Document], share: float) -> Split:
    """Hold out about ``share`` of the documents, whole families of near-duplicates together.

    A family goes to the side that a hash of its first content says, so the side of a document does not
    depend on the order of files, on their names or on what else is in the corpus, but for its own near
    copies. The family with the smallest hash is always held out, the one with the largest never; a corpus
    that is one family is cut within its documents.
    """
    digests: list[str] = []
    signatures: list[RMinHash] = []
    fingerprint = hashlib.sha256()
    n_bytes = 0
    for document in corpus:
        content = document.text.encode()
        n_bytes += len(content)
        digests.append(hashlib.sha256(content).hexdigest())
        signatures.append(_signature(document.text))
        fingerprint.update(f"{document.id}\0{digests[-1]}\n".encode())
    first = {digest: place for place, digest in reversed(list(enumerate(digests)))}
    duplicates = frozenset(place for place, digest in enumerate(digests) if first[digest] != place)
    families: dict[str, list[int]] = {}
    for place, family in enumerate(_families(signatures)):
        families.setdefault(min(digests[member] for member in family), []).append(place)
    held_out = ({key for key in families if int(key[:16], 16) / 2**64 < share} | {min(families)}) - {max(families)}
    divisible = len(families) > 1
    return Split(
        validation=frozenset(place for key in held_out for place in families[key]) if divisible else frozenset(),
        duplicates=duplicates,
        cut=None if divisible else share,
        fingerprint=fingerprint.hexdigest(),
        n_bytes=n_bytes,
    )


def _signature(text: str) -> RMinHash:
    """MinHash of the text's overlapping five-word shingles."""
    words = text.split()
    shingles = {" ".join(group) for group in zip(*(islice(words, i, None) for i in range(SHINGLE_WORDS)), strict=False)}
    signature = RMinHash(num_perm=PERMUTATIONS, seed=0)
    signature.update(list(shingles) or [" ".join(words)])
    return signature


def _families(signatures: list[RMinHash]) -> list[frozenset[int]]:
    """For every document, the set of documents it is linked to by a chain of near-duplicates."""
    index = RMinHashLSH(threshold=NEAR_DUPLICATE, num_perm=PERMUTATIONS, num_bands=BANDS)
    family: list[set[int]] = []
    for place, signature in enumerate(signatures):
        family.append({place})
        for other in index.query(signature):
            if other not in family[place] and signature.jaccard(signatures[other]) >= NEAR_DUPLICATE:
                family[other] |= family[place]
                for member in family[other]:
                    family[member] = family[other]
        index.insert(place, signature)
    return [frozenset(members) for members in family]
