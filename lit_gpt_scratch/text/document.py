"""Documents, the units of a corpus, and the table rows that they are read from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lit_gpt_scratch.errors import UserError

MAX_DOCUMENT_BYTES: Final = 2**25
"""Maximum bytes per document, row or line; anything longer is unlikely to be human-written."""


def is_blank(text: str) -> bool:
    """Whether a string is empty or contains only whitespace."""
    return not text or text.isspace()


@dataclass(frozen=True, slots=True)
class Document:
    """Text with an id that identifies its location: a file, or a file and a row."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class RejectedDocument:
    """A source entry that is not a document, with the reason; ``n_bytes`` is its size in the source."""

    id: str
    reason: str
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table.

    Attributes:
        id: Identifier of the row: the file and the row number, starting at 1.
        where: Location of the row for error messages: the file, and the line number if the file has lines.
        fields: Values by column name.
    """

    id: str
    where: str
    fields: dict[str, Any]


def get_text(fields: Mapping[str, Any], column: str) -> str:
    """Return the text in a column, or "" if it is missing.

    Raises:
        UserError: The value is not a string. The caller adds the location to the message.
    """
    value = fields.get(column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"'{column}' is {type(value).__name__}, not text")
    return value or ""


class ClassIndex(int):
    """A class index from a dataset with named classes; it keeps the name of its class."""

    name: str | None
    """Name of the class; None for index -1, which Hub datasets use for a missing label."""

    @classmethod
    def from_names(cls, index: int, names: Sequence[str]) -> "ClassIndex":
        """Build a class index, given the names of all classes in order."""
        result = cls(index)
        result.name = names[index] if index >= 0 else None
        return result


def get_label(fields: Mapping[str, Any], column: str) -> str:
    """Return the label in a column as a string; it may be a string, an integer, or the name of a ``ClassIndex``.

    Raises:
        UserError: The label is missing or has another type. The caller adds the location to the message.
    """
    value = fields.get(column)
    if isinstance(value, ClassIndex):
        value = value.name
    if value is None or value != value or is_blank(str(value)):  # NaN, pandas' missing value, is unequal to itself
        raise UserError(f"'{column}' is empty: a label is missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # an integer column with missing values is read as floats
    if isinstance(value, bool | float) or not isinstance(value, str | int):
        raise UserError(f"'{column}' is {value!s:.40} ({type(value).__name__}), not a label: a text or an integer")
    return str(value).strip()
