"""Readers for JSON Lines, JSON, CSV, TSV, Parquet and Arrow files with named columns, optionally compressed.

Parquet and Arrow files are read with ``pyarrow``, all other files row by row with Python's ``json`` and ``csv``.
Readers that parse many rows at once (``datasets``, ``pandas``) infer the types of columns from the first rows, drop
text if a row has more or fewer fields than the first row, and crash on deeply nested JSON. The row size is limited
during decompression, so a small archive cannot exhaust the memory.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import unique_keys
from lit_gpt_scratch.terminal_output import escape_line
from lit_gpt_scratch.text import arrow_limits
from lit_gpt_scratch.text.document import MAX_DOCUMENT_BYTES, ClassIndex, Document, TableRow, get_text

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

DECOMPRESSORS: Final[dict[str, Callable[[Path], Any]]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open,
}  # fmt: skip
READ_ERRORS: Final = (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError)
"""Exceptions that may be raised while reading a compressed or uncompressed file."""
TABLE_FORMATS: Final = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
ALWAYS_TABLES: Final = (".jsonl", ".ndjson", ".parquet", ".arrow")
"""Suffixes of files that are read as tables even inside a folder, where all other files are read as plain text."""
ARROW_MAGIC: Final = b"ARROW1\0\0"
JSON_CHUNK: Final = 2**16
"""Minimum number of characters to read at a time from a JSON file that is not in JSON Lines format."""
MAX_DEPTH: Final = 100
"""Maximum nesting depth of lists and objects in a column."""
MAX_NAMES: Final = 20
"""Maximum number of column names in an error message."""
MAX_NAME_CHARACTERS: Final = 60
MAX_REASON_CHARACTERS: Final = 200
"""Maximum number of characters to quote from a library's error message."""
CSV_REASONS: Final = {
    "new-line character": "it contains a carriage return (\\r) outside quotes; convert the line endings to \\n",
    "unexpected end of data": "a quoted field has no closing quote",
    "expected after": "text follows the closing quote of a field; double the quotes inside the field",
    "field larger": f"a field is longer than {MAX_DOCUMENT_BYTES >> 20} MB",
    "NUL": "it contains a NUL byte",
}
"""Descriptions of errors in CSV files, keyed by a substring of the error message of ``csv``."""

Columns = Mapping[str, str]
"""Names of the columns to read, keyed by the argument that sets each name."""
Fields = dict[str, Any]
LocatedRows = Iterator[tuple[str, Fields]]
"""Iterator over pairs of a row's location and its values, keyed by column name."""


def open_decompressed(path: Path) -> IO[bytes]:
    """Open a file in binary mode for reading, decompressing it according to its suffix."""
    suffix = path.suffix.lower()
    file: IO[bytes] = DECOMPRESSORS[suffix](path) if suffix in DECOMPRESSORS else path.open("rb")
    return file


def read_rows(path: Path, name: str, columns: Columns | None) -> Iterator[TableRow]:
    """Yield the rows of a table file; the id of the third row is ``name:3``.

    Args:
        path: Path to the file.
        name: Name of the file, which becomes part of the row ids.
        columns: Columns to read; if None, all columns are read.

    Raises:
        UserError: A column is missing or ambiguous, or a row cannot be read.
    """
    read = ROW_READERS[TABLE_FORMATS[_format_suffix(path)]]
    for number, (where, fields) in enumerate(read(path, columns), 1):
        yield TableRow(f"{name}:{number}", where, fields)


def row_to_document(row: TableRow, column: str) -> Document:
    """Convert the text in a column to a document; the document is empty if the text is missing.

    Raises:
        UserError: The value is not a string or is too long.
    """
    try:
        text = get_text(row.fields, column)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    if len(text) > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"{row.where}: the text is {len(text) >> 20} MB long; the maximum is {MAX_DOCUMENT_BYTES >> 20} MB; "
            "split the text"
        )
    return Document(row.id, text)


def is_table(path: Path, in_folder: bool) -> bool:
    """Return whether a file is a table, based on its suffix.

    In a folder, files with the suffixes ``.json``, ``.csv`` and ``.tsv`` are treated as plain text.
    """
    return _format_suffix(path) in (ALWAYS_TABLES if in_folder else TABLE_FORMATS)


def require_columns(columns: Columns | None, existing: Iterable[str], where: str) -> None:
    """Check that each requested column exists exactly once.

    Raises:
        UserError: A column does not exist, or several columns have its name.
    """
    counts = Counter(iter(existing))  # the names in a mapping, not its values
    for argument, column in (columns or {}).items():
        if column not in counts:
            names = ", ".join(map(_shorten_name, list(counts)[:MAX_NAMES])) or "none"
            more = f", and {len(counts) - MAX_NAMES:,} more" if len(counts) > MAX_NAMES else ""
            raise UserError(
                f"{where} has no column '{column}'; set --data.{argument} to an existing column ({names}{more})"
            )
    for column in counts if columns is None else columns.values():
        if column and counts[column] > 1:  # empty names are common after the last column
            raise UserError(f"{where} has {counts[column]} columns named '{_shorten_name(column)}'; rename them")


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, shortened, or its type if the message is empty."""
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0], MAX_REASON_CHARACTERS)


def convert_class_labels(values: Iterable[Any], names: list[str]) -> list[Any]:
    """Convert integers to ``ClassIndex``; other values, such as None, are not changed."""
    return [ClassIndex.from_names(value, names) if isinstance(value, int) else value for value in values]


def shorten(text: str, length: int) -> str:
    """Return at most the first ``length`` characters of a string, with an ellipsis if more follow."""
    return text if len(text) <= length else f"{text[:length]}…"


def _shorten_name(name: str) -> str:
    """Shorten a column name, and escape its control characters and unpaired surrogates, for an error message."""
    return escape_line(shorten(name, MAX_NAME_CHARACTERS).encode(errors="backslashreplace").decode())


def _format_suffix(path: Path) -> str:
    uncompressed = path.with_suffix("") if path.suffix.lower() in DECOMPRESSORS else path
    return uncompressed.suffix.lower()


def _read_parquet(path: Path, columns: Columns | None) -> LocatedRows:
    def read() -> Iterator[Any]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path, buffer_size=2**20) as file:
            require_columns(columns, file.schema_arrow.names, str(path))
            names = file.schema_arrow.names if columns is None else list(columns.values())
            rows, references = arrow_limits.plan_parquet_batches(file, set(names), path)
        with pq.ParquetFile(path, buffer_size=2**20, read_dictionary=references) as file:
            yield from file.iter_batches(rows, columns=names)

    yield from _read_batches(read(), path, columns)


def _read_arrow(path: Path, columns: Columns | None) -> LocatedRows:
    def read() -> Iterator[Any]:
        import pyarrow as pa

        with path.open("rb") as file:
            # An Arrow file contains an Arrow stream after its magic string.
            start = len(ARROW_MAGIC) if file.read(len(ARROW_MAGIC)) == ARROW_MAGIC else 0
        with pa.memory_map(str(path)) as mapped:
            mapped.seek(start)
            arrow_limits.limit_arrow_buffers(path, mapped)
        with pa.OSFile(str(path)) as file:
            file.seek(start)
            for batch in pa.ipc.open_stream(file):
                require_columns(columns, batch.schema.names, str(path))
                batch.validate(full=True)  # invalid offsets would crash the process
                yield batch

    yield from _read_batches(read(), path, columns)


def _read_batches(batches: Iterator[Any], path: Path, columns: Columns | None) -> LocatedRows:
    """Yield the rows of Arrow record batches, converting the class labels of ``datasets`` to ``ClassIndex``."""
    number = 0
    try:
        for whole in batches:
            classes = _class_names(whole.schema.metadata)
            names = list(whole.schema.names if columns is None else columns.values())
            for batch in arrow_limits.split_batch(whole, set(names), path, number):
                arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
                values = [
                    convert_class_labels(arrays[name].to_pylist(), classes[name])
                    if name in classes
                    else arrays[name].to_pylist()
                    for name in names
                ]
                for row in zip(*values, strict=True):
                    number += 1
                    yield f"{path}: row {number:,}", dict(zip(names, row, strict=True))
    except UserError:
        raise
    except Exception as error:  # the exceptions of pyarrow have no common base class
        format_ = TABLE_FORMATS[_format_suffix(path)]
        after = f" after row {number:,}" if number else ""
        raise UserError(f"{path} cannot be read as {format_}{after}: {first_line(error)}") from error


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Return the class names of each ``ClassLabel`` column, as stored by ``datasets`` in the schema metadata."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        classes = {name: feature["names"] for name, feature in features.items() if feature["_type"] == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    return {
        column: names
        for column, names in classes.items()
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
    }


def _open(path: Path) -> IO[bytes]:
    try:
        return open_decompressed(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line, omitting a byte order mark at the start of the file."""
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                if len(line) > MAX_DOCUMENT_BYTES:
                    raise UserError(f"{path}: line {number:,} is longer than {MAX_DOCUMENT_BYTES >> 20} MB; shorten it")
                text = line.decode("utf-8")
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"line {number:,}", error) from error
    except READ_ERRORS as error:
        raise _truncated(path, number, error) from error


def _not_utf8(path: Path, where: str, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(f"{path}: {where} is not UTF-8 (byte 0x{byte:02x}); convert the file to UTF-8")


def _truncated(path: Path, line: int, error: Exception) -> UserError:
    return UserError(f"{path} is truncated or corrupted after line {line:,}: {first_line(error)}")


def _read_json(path: Path, columns: Columns | None) -> LocatedRows:
    if _format_suffix(path) == ".json" or _begins_with_list(path):
        yield from _read_json_values(path, columns)
        return
    first = True
    for number, line in _read_lines(path):
        if line.strip():
            where = f"{path}: line {number:,}"
            try:
                row = json.loads(line.lstrip("\ufeff"), object_pairs_hook=unique_keys)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not valid JSON: {_json_reason(error)}") from error
            yield where, _select_fields(row, columns, where, str(path) if first else None)
            first = False


def _begins_with_list(path: Path) -> bool:
    with _open(path) as file:
        try:
            while chunk := file.read(JSON_CHUNK):
                if start := chunk.lstrip(b"\xef\xbb\xbf \t\r\n"):
                    return start.startswith(b"[")
        except READ_ERRORS:  # the file is read again, and this error reported with its line
            pass
    return False


def _read_json_values(path: Path, columns: Columns | None) -> LocatedRows:
    """Read rows from a JSON array, or from concatenated JSON values, each of which may span several lines."""
    with _open(path) as file:
        reader = JsonValueReader(file)
        first = True
        try:
            for place, row in reader.read_rows():
                where = f"{path}: {place}"
                yield where, _select_fields(row, columns, where, where if first else None)
                first = False
        except UserError:
            raise
        except UnicodeDecodeError as error:
            raise _not_utf8(path, f"the text after line {reader.line:,}", error) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON (line {reader.line:,}): {_json_reason(error)}") from error
        except READ_ERRORS as error:
            raise _truncated(path, reader.line, error) from error


class JsonValueReader:
    """Reader that parses JSON values one at a time, so that a file may be larger than the available memory.

    Attributes:
        line: Number of the current line, starting at 1.
    """

    _whitespace: Final = re.compile(r"[ \t\r\n]*")
    _decoder: Final = json.JSONDecoder(object_pairs_hook=unique_keys)

    def __init__(self, file: IO[bytes]) -> None:
        self._text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self._buffer, self._position = "", 0
        self.line = 1

    def read_rows(self) -> Iterator[tuple[str, Any]]:
        """Yield the location and value of each element if the text is a JSON array, otherwise of each top-level value.

        Raises:
            ValueError: The text is not valid JSON, or a value is too long.
        """
        if not self._skip("["):
            while self._next_character():
                yield f"line {self.line:,}", self._read_value()
            return
        number = 0
        while not (number == 0 and self._skip("]")):
            number += 1
            yield f"row {number:,}", self._read_value()
            if self._skip("]"):
                break
            if not self._skip(","):
                raise ValueError("a comma is missing" if self._next_character() else "the list has no closing bracket")
        if self._next_character():
            raise ValueError("text follows the list")

    def _skip(self, character: str) -> bool:
        """Skip whitespace and, if it comes next, ``character``; return whether ``character`` was found."""
        found = self._next_character() == character
        self._position += found
        return found

    def _next_character(self) -> str:
        """Skip whitespace, and return the next character, or an empty string at the end of the file."""
        while True:
            whitespace = self._whitespace.match(self._buffer, self._position)
            self._advance(whitespace.end() if whitespace else self._position)
            if self._position < len(self._buffer) or not self._fill():
                return self._buffer[self._position : self._position + 1]

    def _read_value(self) -> Any:
        self._next_character()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                self._limit(len(self._buffer))
                if self._fill():  # the value may continue
                    continue
                self._advance(error.pos)
                raise
            self._limit(end)
            self._advance(end)
            return value

    def _limit(self, end: int) -> None:
        if end - self._position > MAX_DOCUMENT_BYTES:
            raise ValueError(f"a row is longer than {MAX_DOCUMENT_BYTES >> 20} MB or lacks a closing bracket or quote")

    def _advance(self, position: int) -> None:
        self.line += self._buffer.count("\n", self._position, position)
        self._position = position

    def _fill(self) -> bool:
        """Read at least as much text as is left in the buffer, so that parsing a long value takes linear time.

        Returns:
            False at the end of the file, otherwise True.
        """
        left = self._buffer[self._position :]
        more = self._text.read(max(JSON_CHUNK, len(left)))
        self._buffer, self._position = left + more, 0
        return bool(more)


def _json_reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


def _select_fields(row: Any, columns: Columns | None, where: str, required_in: str | None) -> Fields:
    """Return the requested columns of a row.

    Args:
        row: A parsed JSON value.
        columns: Columns to select; None selects all.
        where: Location of the row, used in error messages.
        required_in: Location for the error message if a column is missing. If None, columns may be missing; only the
            first row must have all columns.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a JSON object, but its type is {type(row).__name__}")
    if required_in is not None:
        require_columns(columns, row, required_in)
    names = row if columns is None else columns.values()
    fields = {name: row.get(name) for name in names}
    for name, value in fields.items():
        if _is_deeper(value, MAX_DEPTH):
            raise UserError(
                f"{where}: '{_shorten_name(name)}' has more than {MAX_DEPTH} levels of nested lists and objects; "
                "flatten it"
            )
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: '{_shorten_name(name)}' contains an unpaired surrogate; replace it with a valid character"
            ) from error
    return fields


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether a JSON value has more than ``levels`` levels of nested lists and objects."""
    if not isinstance(value, list | dict):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in items)


def _read_csv(path: Path, columns: Columns | None) -> LocatedRows:
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    row_start, row_size = 1, 0

    def lines() -> Iterator[str]:
        nonlocal row_size
        for _, line in _read_lines(path):
            row_size += len(line)
            if row_size > MAX_DOCUMENT_BYTES:
                raise UserError(
                    f"{path}: the row that begins on line {row_start:,} is longer than {MAX_DOCUMENT_BYTES >> 20} MB, "
                    "or one of its quoted fields has no closing quote"
                )
            yield line

    def numbered_rows() -> Iterator[tuple[int, list[str]]]:
        nonlocal row_start, row_size
        reader = csv.reader(lines(), strict=True)
        try:
            for row in reader:
                yield row_start, row
                row_start, row_size = reader.line_num + 1, 0
        except csv.Error as error:
            message = str(error)
            reason = next((reason for part, reason in CSV_REASONS.items() if part in message), message)
            raise UserError(f"{path}: line {row_start:,} cannot be read: {reason}") from error

    yield from _name_fields(numbered_rows(), path, columns)


def _read_tsv(path: Path, columns: Columns | None) -> LocatedRows:
    """Read TSV rows without interpreting quotes, because an unpaired quote would join all following rows."""
    rows = (
        (number, line.rstrip("\r\n").split("\t") if line.strip("\r\n") else []) for number, line in _read_lines(path)
    )
    yield from _name_fields(rows, path, columns)


def _name_fields(rows: Iterator[tuple[int, list[str]]], path: Path, columns: Columns | None) -> LocatedRows:
    """Convert lists of fields to rows with named columns; the first row is the header."""
    names = next(rows, (1, []))[1]
    require_columns(columns, names, str(path))
    positions = {name: position for position, name in reversed(list(enumerate(names)))}
    wanted = list(dict.fromkeys(names)) if columns is None else list(columns.values())
    for number, row in rows:
        if row and len(row) != len(names):
            raise UserError(f"{path}: line {number:,} has {len(row)} fields, but the header has {len(names)}")
        if row:
            yield f"{path}: line {number:,}", {name: row[positions[name]] for name in wanted}


ROW_READERS: Final[dict[str, Callable[[Path, Columns | None], LocatedRows]]] = {
    "json": _read_json, "csv": _read_csv, "tsv": _read_tsv, "parquet": _read_parquet, "arrow": _read_arrow,
}  # fmt: skip
