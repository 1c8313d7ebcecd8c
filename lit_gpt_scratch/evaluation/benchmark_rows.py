"""Read and validate the rows of a benchmark file. Error messages include the location of the row."""

from collections.abc import Iterator, Sequence

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.sources import DocumentSource


def read_rows(source: str) -> Iterator[TableRow]:
    """Read all rows of a source.

    Raises:
        UserError: The source is missing or contains no rows, or a row cannot be read.
    """
    rows = DocumentSource(source)
    rows.fingerprint()  # raises an error immediately if the source is missing
    return rows.rows()


def get_text(row: TableRow, *columns: str) -> str:
    """Return the string in the first of the given columns that is not empty.

    Raises:
        UserError: All columns are missing or empty, or the value is not a string.
    """
    found = next((name for name in columns if row.fields.get(name) not in (None, "")), None)
    if found is None:
        there = ", ".join(row.fields) or "none"
        raise UserError(
            f"{row.where} has no text in column {' or '.join(map(repr, columns))} (the row has columns {there}); "
            "add the column or remove the row"
        )
    value = row.fields[found]
    if not isinstance(value, str):
        raise UserError(f"{row.where}: '{found}' must be a string, but its type is {type(value).__name__}")
    return value


def get_texts(row: TableRow, column: str) -> list[str]:
    """Return the list of strings in a column.

    Raises:
        UserError: The value is not a list of at least two non-empty strings.
    """
    found = row.fields.get(column)
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(each, str) and each for each in found):
        raise UserError(
            f"{row.where}: '{column}' must be a list of at least two non-empty strings, but it is {found!r:.60}"
        )
    return found


def get_choice(row: TableRow, column: str, names: Sequence[str]) -> int:
    """Return the zero-based index of a choice from a column that contains the index or the name of the choice.

    Raises:
        UserError: The value is neither an index in range nor one of the names.
    """
    found = row.fields.get(column)
    if isinstance(found, str) and found in names:
        return names.index(found)
    if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < len(names):
        return found
    raise UserError(
        f"{row.where}: '{column}' is {found!r:.60}; it must be an index from 0 to {len(names) - 1}, or one of "
        f"{', '.join(map(repr, names))}"
    )
