"""Documents of a corpus, and the table rows from which they are read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lit_gpt_scratch.errors import UserError

MAX_DOCUMENT_BYTES: Final = 2**25
"""Maximum size of a document, row or line in bytes; longer texts are rejected, as humans are unlikely to write them."""


def is_blank(text: str) -> bool:
    """Return whether a string is empty or contains only whitespace."""
    return not text or text.isspace()


def first_words(text: str) -> str:
    """Return the first words of a text: up to four words on one line, with at most 40 characters; may be empty."""
    found = re.search(r"[^\W_]\S*(?:[ \t]+\S+){0,3}", text)
    return found[0][:40].strip() if found else ""


@dataclass(frozen=True, slots=True)
class Document:
    """Document text with an id: the file name and, for tables and large text files, the row or chunk number."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class RejectedDocument:
    """A document that was skipped when its source was read, with the reason and its size in bytes."""

    id: str
    reason: str
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table.

    Attributes:
        id: File name and row number, starting at 1.
        where: Location of the row for error messages: the file and the line or row number.
        fields: Column values keyed by column name.
    """

    id: str
    where: str
    fields: dict[str, Any]


def get_text(fields: Mapping[str, Any], column: str) -> str:
    """Return the string in a column, or an empty string if the value is missing.

    Raises:
        UserError: The value is not a string. The caller adds the location to the message.
    """
    value = fields.get(column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"'{column}' must be a string, but its type is {type(value).__name__}")
    return value or ""


class ClassIndex(int):
    """Class index that also stores the name of the class, for datasets with named classes."""

    name: str | None
    """Name of the class; None for an index without a name, such as -1, which Hub datasets use for a missing label."""

    @classmethod
    def from_names(cls, index: int, names: Sequence[str]) -> "ClassIndex":
        """Build a class index from the names of all classes, in order of their indices."""
        result = cls(index)
        result.name = names[index] if 0 <= index < len(names) else None
        return result


def get_label(fields: Mapping[str, Any], column: str) -> str:
    """Return the label in a column, which may be a string, an integer or a ``ClassIndex``, as a string.

    Raises:
        UserError: The label is missing or has the wrong type. The caller adds the location to the message.
    """
    value = fields.get(column)
    if isinstance(value, ClassIndex):
        value = value.name
    if value is None or value != value or is_blank(str(value)):  # NaN, pandas' missing value, is unequal to itself
        raise UserError(f"the label in '{column}' is missing; add a label or remove the row")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # an integer column with missing values is read as floats
    if isinstance(value, bool | float) or not isinstance(value, str | int):
        raise UserError(f"'{column}' is {value!s:.40} ({type(value).__name__}); a label must be a string or an integer")
    return str(value).strip()
