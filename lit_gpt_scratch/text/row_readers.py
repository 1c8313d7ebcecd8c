"""Rows of JSON lines, JSON lists, CSV and TSV, read one by one, each with the line where it stands."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.decompress import READ_ERRORS, open_decompressed
from lit_gpt_scratch.text.document import MAX_DOCUMENT_BYTES

Columns = Mapping[str, str]
"""The columns that are wanted, by the argument that names each; None instead stands for all there are."""
Fields = dict[str, Any]
Found = Iterator[tuple[str, Fields]]
"""The place of each row, and what is in its columns."""


def require_columns(columns: Columns | None, there: Iterable[str], where: str) -> None:
    """Refuse a column that is not there."""
    for argument, column in (columns or {}).items():
        if column not in there:
            found = ", ".join(there) or "none"
            raise UserError(f"{where} has no column '{column}'; there is {found}; name one: --data.{argument}")


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            if len(line) > MAX_DOCUMENT_BYTES:
                raise UserError(f"{path}: line {number:,} is longer than {MAX_DOCUMENT_BYTES >> 20} MB")
            yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: line {number:,} is not UTF-8: it has the byte 0x{error.object[error.start]:02x}"
        ) from error
    except READ_ERRORS as error:
        raise UserError(f"{path} is cut off or damaged after line {number:,}: {first_line(error)}") from error


def _json(file: IO[bytes], path: Path, columns: Columns | None) -> Found:
    first = True
    for number, line in _lines(file, path):
        if number == 1 and line.lstrip("\ufeff").lstrip().startswith("["):  # one list of all rows
            yield from _json_list(path, columns)
            return
        if line.strip():
            try:
                row = json.loads(line.lstrip("\ufeff"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number:,} is not JSON: {first_line(error)}") from error
            yield _object(row, columns, f"{path}: line {number:,}", first)
            first = False


def _json_list(path: Path, columns: Columns | None) -> Found:
    with open_decompressed(path) as file:
        try:
            found = json.load(file)
        except (ValueError, RecursionError, *READ_ERRORS) as error:
            raise UserError(f"{path} is not JSON: {first_line(error)}") from error
    for number, row in enumerate(found, 1):
        yield _object(row, columns, f"{path}: row {number:,}", first=number == 1)


def _object(row: Any, columns: Columns | None, where: str, first: bool) -> tuple[str, Fields]:
    if not isinstance(row, dict):
        raise UserError(f"{where} is {type(row).__name__}, not an object with named fields")
    if first:  # a later row may lack what has no value there
        require_columns(columns, row, where)
    names = row if columns is None else columns.values()
    fields = {name: row.get(name) for name in names}
    for name, value in fields.items():
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: '{name}' has half a surrogate pair, which is no character") from error
    return where, fields


def _comma_separated(file: IO[bytes], path: Path, columns: Columns | None) -> Found:
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    reader = csv.reader((line for _, line in _lines(file, path)), strict=True)
    begins = 1

    def numbered() -> Iterator[tuple[int, list[str]]]:
        nonlocal begins
        try:
            for row in reader:
                yield begins, row
                begins = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}: line {begins:,} cannot be read: {error}") from error

    yield from _named(numbered(), path, columns)


def _tab_separated(file: IO[bytes], path: Path, columns: Columns | None) -> Found:
    """No quotes: a message that begins with one would swallow those after it."""
    rows = (
        (number, line.rstrip("\r\n").split("\t") if line.strip("\r\n") else []) for number, line in _lines(file, path)
    )
    yield from _named(rows, path, columns)


def _named(rows: Iterator[tuple[int, list[str]]], path: Path, columns: Columns | None) -> Found:
    """Rows of fields, of which the first row has the names."""
    names = [name.removeprefix("\ufeff") for name in next(rows, (1, []))[1]]
    require_columns(columns, names, str(path))
    places = {name: names.index(name) for name in (names if columns is None else columns.values())}
    for number, row in rows:
        if row and len(row) != len(names):
            raise UserError(f"{path}: line {number:,} has {len(row)} fields, not {len(names)} like the first")
        if row:
            yield f"{path}: line {number:,}", {name: row[place] for name, place in places.items()}


def first_line(error: Exception) -> str:
    """What an error says, without the rest of it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


READERS: Final[dict[str, Callable[[IO[bytes], Path, Columns | None], Found]]] = {
    "json": _json, "csv": _comma_separated, "tsv": _tab_separated,
}  # fmt: skip
