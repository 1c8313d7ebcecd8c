"""What a corpus is made of."""

from dataclasses import dataclass
from typing import Final

LONGEST: Final = 2**25
"""Bytes of a document, a record or a line; what is longer is no text that a person wrote."""


def blank(text: str) -> bool:
    """Whether there is nothing but space."""
    return not text or text.isspace()


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name by which it can be found again: a file, or a file and a row."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Rejected:
    """What a source has and does not give as a document, and why; ``n_bytes`` as they lie in the source."""

    id: str
    reason: str
    n_bytes: int = 0
