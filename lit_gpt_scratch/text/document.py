"""Documents, of which a corpus consists, and table rows, from which they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lit_gpt_scratch.errors import UserError

MAX_DOCUMENT_BYTES: Final = 2**25
"""Maximum bytes of a document, a row or a line; anything longer is not written by a person."""


def is_blank(text: str) -> bool:
    """Whether a text is empty or whitespace."""
    return not text or text.isspace()


@dataclass(frozen=True, slots=True)
class Document:
    """A text with an id that locates it: a file, or a file and a row."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class RejectedDocument:
    """An entry of a source that is not a document, and why; ``n_bytes`` is its size in the source."""

    id: str
    reason: str
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table.

    Attributes:
        id: Locates the row: the file and the row number, from 1.
        where: Its location for error messages: the file, and the line in it if the file has lines.
        fields: Its values by column name.
    """

    id: str
    where: str
    fields: dict[str, Any]


def get_text(fields: Mapping[str, Any], column: str) -> str:
    """Return the text in a column, or "" if there is none.

    Raises:
        UserError: The value is not text; without its location, which the caller knows.
    """
    value = fields.get(column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"'{column}' is {type(value).__name__}, not text")
    return value or ""


class ClassIndex(int):
    """A class index from a dataset that also knows the names of its classes."""

    name: str | None
    """None for -1, which Hub datasets use for a missing label."""

    @classmethod
    def from_names(cls, index: int, names: Sequence[str]) -> "ClassIndex":
        """Build one with its name, given the names of all classes in order."""
        result = cls(index)
        result.name = names[index] if index >= 0 else None
        return result


def get_label(fields: Mapping[str, Any], column: str) -> str:
    """Return the label in a column: a text, an integer, or the name of a dataset's class.

    Raises:
        UserError: It is missing, or something else; without its location, which the caller knows.
    """
    value = fields.get(column)
    if isinstance(value, ClassIndex):
        value = value.name
    if value is None or value != value or is_blank(str(value)):  # NaN is not equal to itself: pandas' missing value
        raise UserError(f"'{column}' is empty: a label is missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # an integer column with missing values is read as floats
    if isinstance(value, bool | float) or not isinstance(value, str | int):
        raise UserError(f"'{column}' is {value!s:.40} ({type(value).__name__}), not a label: a text or an integer")
    return str(value).strip()
