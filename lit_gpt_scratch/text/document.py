"""What a corpus is made of, and what it is read from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lit_gpt_scratch.errors import UserError

MAX_DOCUMENT_BYTES: Final = 2**25
"""Bytes of a document, a record or a line; what is longer is no text that a person wrote."""


def is_blank(text: str) -> bool:
    """Whether there is nothing but space."""
    return not text or text.isspace()


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name by which it can be found again: a file, or a file and a row."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class RejectedDocument:
    """What a source has and does not give as a document, and why; ``n_bytes`` as they lie in the source."""

    id: str
    reason: str
    n_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table.

    Attributes:
        id: A name by which it can be found again: a file and the number of the row, from 1.
        where: Its place as a user can look it up, for a message: the file, and the line in it if it has lines.
        fields: What is in its columns, by their names.
    """

    id: str
    where: str
    fields: dict[str, Any]


def get_text(fields: Mapping[str, Any], column: str) -> str:
    """The text in a column; empty where there is nothing.

    Raises:
        UserError: There is something else; without its place, which the caller knows.
    """
    value = fields.get(column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"'{column}' is {type(value).__name__}, not text")
    return value or ""


class ClassIndex(int):
    """The number of a class, as a dataset keeps it that knows the names of its classes."""

    name: str | None
    """None of -1, which the Hub has where a label is not told."""

    @classmethod
    def of(cls, number: int, names: Sequence[str]) -> "ClassIndex":
        """With its name, of all in order."""
        found = cls(number)
        found.name = names[number] if number >= 0 else None
        return found


def get_label(fields: Mapping[str, Any], column: str) -> str:
    """The label in a column: a text, a whole number, or the name of the class that a dataset has a number for.

    Raises:
        UserError: It is missing, or something else; without its place, which the caller knows.
    """
    value = fields.get(column)
    if isinstance(value, ClassIndex):
        value = value.name
    if (
        value is None or value != value or is_blank(str(value))
    ):  # only NaN is not itself: pandas has it where nothing is
        raise UserError(f"'{column}' is empty: a label is missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers with gaps is one of floats
    if isinstance(value, bool | float) or not isinstance(value, str | int):
        raise UserError(f"'{column}' is {value!s:.40} ({type(value).__name__}), not a label: a text or whole number")
    return str(value).strip()
