"""Readers for JSON Lines, JSON, CSV, TSV, Parquet and Arrow files with named columns, optionally compressed.

Parquet files, Arrow files and single columns of JSON Lines files are read with ``datasets``. If ``datasets`` fails on a
JSON Lines file, this module reads the remaining rows line by line. It either locates the invalid line, or succeeds
because all lines are valid and ``datasets`` only inferred the wrong types (for a column that first occurs late in the
file, or a string that looks like a date). CSV files are read with Python's ``csv`` and TSV files are split at tabs,
because ``datasets`` uses ``pandas``, which silently drops text if a row has more or fewer fields than the first row.
"""

import bz2
import csv
import glob
import gzip
import json
import logging
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

from lit_gpt_scratch.errors import UserError
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
BATCH_ROWS: Final = 256

Columns = Mapping[str, str]
"""Names of the columns to read, keyed by the argument that sets each name."""
Fields = dict[str, Any]
LocatedRows = Iterator[tuple[str, Fields]]
"""Iterator over rows, each a pair of its location and its values by column name."""


def open_decompressed(path: Path) -> IO[bytes]:
    """Open a file in binary mode for reading, decompressing it according to its suffix."""
    suffix = path.suffix.lower()
    file: IO[bytes] = DECOMPRESSORS[suffix](path) if suffix in DECOMPRESSORS else path.open("rb")
    return file


def read_rows(path: Path, name: str, columns: Columns | None) -> Iterator[TableRow]:
    """Yield the rows of a table file; the id of the third row is ``name:3``.

    Args:
        path: Path of the file.
        name: Name of the file, which becomes part of the row ids.
        columns: Columns to read; if None, all columns are read.

    Raises:
        UserError: A column is missing, or a row cannot be read.
    """
    n_read = 0
    try:
        for fields in _read_with_datasets(path, columns):
            n_read += 1
            yield TableRow(f"{name}:{n_read}", f"{path}: row {n_read:,}", fields)
        return
    except UserError:
        raise
    except Exception as error:  # the readers for the various formats have no common exception type
        reason = error
    for number, (where, fields) in enumerate(_read_rest(path, columns, reason, skip=n_read), n_read + 1):
        yield TableRow(f"{name}:{number}", where, fields)


def row_to_document(row: TableRow, column: str) -> Document:
    """Convert the text in a column to a document, which is empty if the text is missing.

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
    """Check that all requested columns exist.

    Raises:
        UserError: A column does not exist.
    """
    for argument, column in (columns or {}).items():
        if column not in existing:
            names = ", ".join(existing) or "none"
            raise UserError(f"{where} has no column '{column}'; set --data.{argument} to an existing column ({names})")


def iterate_dataset(dataset: Any, columns: Columns | None, where: str) -> Iterator[Fields]:
    """Yield the rows of a ``datasets`` dataset, converting class labels to ``ClassIndex``.

    Raises:
        UserError: A requested column is missing.
    """
    from datasets import ClassLabel

    classes = {
        name: feature.names for name, feature in (dataset.features or {}).items() if isinstance(feature, ClassLabel)
    }
    for batch in dataset.iter(BATCH_ROWS):
        require_columns(columns, batch, where)
        for name in classes.keys() & batch.keys():
            batch[name] = [
                None if index is None else ClassIndex.from_names(index, classes[name]) for index in batch[name]
            ]
        names = list(batch if columns is None else columns.values())
        for values in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Context manager that disables the progress bars, log messages and Hub download counts of ``datasets``."""
    import datasets

    level, progress_bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    counts, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if progress_bars:
            datasets.enable_progress_bars()


def _format_suffix(path: Path) -> str:
    uncompressed = path.with_suffix("") if path.suffix.lower() in DECOMPRESSORS else path
    return uncompressed.suffix.lower()


def _read_with_datasets(path: Path, columns: Columns | None) -> Iterator[Fields]:
    import datasets
    import pyarrow.parquet

    suffix = _format_suffix(path)
    format_ = TABLE_FORMATS[suffix]
    several = columns is None or len(columns) > 1
    if format_ in ("csv", "tsv") or (format_ == "json" and several) or suffix == ".json" or "::" in str(path):
        # In a column that mixes strings and numbers, datasets would quote the strings; it may also turn lists of
        # objects into an object of lists. "::" in a path is fsspec's syntax for chained URLs.
        raise TypeError("datasets does not support this path")
    options: dict[str, Any] = {}
    if format_ == "json":
        options = {"parse_agent_traces": False}
    if format_ == "parquet":
        require_columns(columns, pyarrow.parquet.read_schema(path).names, str(path))
        options = {"columns": list(columns.values()) if columns else None, "batch_size": BATCH_ROWS}
    with quiet_datasets():
        files = glob.escape(str(path))
        dataset = datasets.load_dataset(format_, data_files=files, split="train", streaming=True, **options)
        for fields in iterate_dataset(dataset, columns, str(path)):
            if format_ == "json" and not all(isinstance(value, str | None) for value in fields.values()):
                raise TypeError("a value is not a string, or datasets parsed it as a date")
            yield fields


def _read_rest(path: Path, columns: Columns | None, reason: Exception, skip: int) -> LocatedRows:
    """Yield each row after the first ``skip`` rows, together with its location in the file."""
    format_ = TABLE_FORMATS[_format_suffix(path)]
    if format_ not in ROW_READERS:
        raise UserError(f"{path} cannot be read as {format_}: {_first_line(reason)}") from reason
    try:
        file = open_decompressed(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    with file:
        yield from islice(ROW_READERS[format_](file, path, columns), skip, None)


def _read_lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            if len(line) > MAX_DOCUMENT_BYTES:
                raise UserError(f"{path}: line {number:,} is longer than {MAX_DOCUMENT_BYTES >> 20} MB; shorten it")
            yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: line {number:,} is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"
        ) from error
    except READ_ERRORS as error:
        raise UserError(f"{path} is truncated or corrupted after line {number:,}: {_first_line(error)}") from error


def _read_json(file: IO[bytes], path: Path, columns: Columns | None) -> LocatedRows:
    first = True
    for number, line in _read_lines(file, path):
        if number == 1 and line.lstrip("\ufeff").lstrip().startswith("["):  # the file is a single list of rows
            yield from _read_json_list(path, columns)
            return
        if line.strip():
            try:
                row = json.loads(line.lstrip("\ufeff"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number:,} is not valid JSON: {_first_line(error)}") from error
            yield _select_fields(row, columns, f"{path}: line {number:,}", first)
            first = False


def _read_json_list(path: Path, columns: Columns | None) -> LocatedRows:
    with open_decompressed(path) as file:
        try:
            rows = json.load(file)
        except (ValueError, RecursionError, *READ_ERRORS) as error:
            raise UserError(f"{path} is not valid JSON: {_first_line(error)}") from error
    for number, row in enumerate(rows, 1):
        yield _select_fields(row, columns, f"{path}: row {number:,}", first=number == 1)


def _select_fields(row: Any, columns: Columns | None, where: str, first: bool) -> tuple[str, Fields]:
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a JSON object, but its type is {type(row).__name__}")
    if first:  # later rows may omit fields that have no value
        require_columns(columns, row, where)
    names = row if columns is None else columns.values()
    fields = {name: row.get(name) for name in names}
    for name, value in fields.items():
        try:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: '{name}' contains an unpaired surrogate; replace it with a valid character"
            ) from error
    return where, fields


def _read_csv(file: IO[bytes], path: Path, columns: Columns | None) -> LocatedRows:
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    reader = csv.reader((line for _, line in _read_lines(file, path)), strict=True)
    row_start = 1

    def numbered_rows() -> Iterator[tuple[int, list[str]]]:
        nonlocal row_start
        try:
            for row in reader:
                yield row_start, row
                row_start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}: line {row_start:,} cannot be read: {error}") from error

    yield from _name_fields(numbered_rows(), path, columns)


def _read_tsv(file: IO[bytes], path: Path, columns: Columns | None) -> LocatedRows:
    """Read TSV rows without interpreting quotes, because an unpaired quote would join all following rows."""
    rows = (
        (number, line.rstrip("\r\n").split("\t") if line.strip("\r\n") else [])
        for number, line in _read_lines(file, path)
    )
    yield from _name_fields(rows, path, columns)


def _name_fields(rows: Iterator[tuple[int, list[str]]], path: Path, columns: Columns | None) -> LocatedRows:
    """Convert lists of fields to rows with named columns; the first row is the header."""
    names = [name.removeprefix("\ufeff") for name in next(rows, (1, []))[1]]
    require_columns(columns, names, str(path))
    positions = {name: names.index(name) for name in (names if columns is None else columns.values())}
    for number, row in rows:
        if row and len(row) != len(names):
            raise UserError(f"{path}: line {number:,} has {len(row)} fields, but the header has {len(names)}")
        if row:
            yield f"{path}: line {number:,}", {name: row[position] for name, position in positions.items()}


def _first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


ROW_READERS: Final[dict[str, Callable[[IO[bytes], Path, Columns | None], LocatedRows]]] = {
    "json": _read_json, "csv": _read_csv, "tsv": _read_tsv,
}  # fmt: skip
