"""Files with a document a row: JSON lines, CSV, TSV, Parquet and Arrow, read by ``datasets``.

Where ``datasets`` stops, the file is read on row by row: either that names the row which cannot be read, or the rows
are sound and only their types are not what ``datasets`` guessed (a column that comes late, a text like a date).
"""

import csv
import json
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.document import LONGEST, Document

FORMATS: Final = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
NEVER_PROSE: Final = (".jsonl", ".ndjson", ".parquet", ".arrow")
"""Files with such names hold rows wherever they lie; the others may be somebody's text."""
COMPRESSED: Final = (".gz", ".zst", ".bz2", ".xz")
ROWS_AT_ONCE: Final = 256
# A tab-separated file knows no quotes: a message that begins with one would swallow those after it.
DIALECT: Final[dict[str, dict[str, Any]]] = {
    "csv": {"quoting": csv.QUOTE_MINIMAL}, "tsv": {"quoting": csv.QUOTE_NONE}
}  # fmt: skip
SEPARATOR: Final = {"csv": ",", "tsv": "\t"}


def opened(path: Path) -> IO[bytes]:
    """A file's bytes, uncompressed if its name says so."""
    import fsspec

    file: IO[bytes] = fsspec.open(str(path.absolute()), "rb", compression="infer").open()
    return file


def rows(path: Path, name: str, column: str) -> Iterator[Document]:
    """The texts of one column; ``name:3`` is the third row. A row without text is an empty document.

    Raises:
        UserError: There is no such column, or a row that cannot be read.
    """
    read = 0
    try:
        for text in _texts(path, column):
            read += 1
            yield document(name, read, text)
        return
    except UserError:
        raise
    except Exception as error:  # whatever the readers of five formats raise
        reason = error
    for number, text in enumerate(_by_hand(path, column, reason, skip=read), read + 1):
        yield document(name, number, text)


def document(name: str, number: int, text: str | None) -> Document:
    """A row as a document.

    Raises:
        UserError: It is longer than any text.
    """
    if text and len(text) > LONGEST:
        raise UserError(f"{name}: row {number:,} has a text of {len(text) >> 20} MB; {LONGEST >> 20} is the most")
    return Document(f"{name}:{number}", text or "")


def has_rows(path: Path, in_folder: bool) -> bool:
    """Whether a file holds a document a row, by its name; in a folder, ``.json`` and ``.csv`` are texts."""
    suffix = _suffix(path)
    return suffix in (NEVER_PROSE if in_folder else FORMATS)


def _suffix(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return inner.suffix.lower()


def texts_of(batches: Iterable[dict[str, list[Any]]], column: str, where: str) -> Iterator[str | None]:
    """One column of batches of rows.

    Raises:
        UserError: There is no such column.
        TypeError: A row has something else than text in it.
    """
    number = 0
    for batch in batches:
        _require(column, batch, where)
        for text in batch[column]:
            number += 1
            if text is not None and not isinstance(text, str):
                raise TypeError(f"row {number:,}: '{column}' is {type(text).__name__}, not text")
            yield text


def _require(column: str, columns: Iterable[str], where: str) -> None:
    if column not in columns:
        there = ", ".join(columns) or "none"
        raise UserError(f"{where} has no column '{column}'; there is {there}; name one: --data.text_column")


def _texts(path: Path, column: str) -> Iterator[str | None]:
    import datasets
    import pyarrow.parquet

    if _suffix(path) == ".json":
        raise TypeError("of a list in which texts and numbers are mixed, datasets would quote the texts")
    format_ = FORMATS[_suffix(path)]
    options: dict[str, Any] = {}
    if format_ == "json":
        options = {"parse_agent_traces": False}
    if format_ == "parquet":
        _require(column, pyarrow.parquet.read_schema(path).names, str(path))
        options = {"columns": [column], "batch_size": ROWS_AT_ONCE}
    if format_ in SEPARATOR:  # as text, every field: "012" is no number, and "NA" is no gap
        as_text = datasets.Features({column: datasets.Value("string")})
        options = {"sep": SEPARATOR[format_], "keep_default_na": False, "na_filter": False, "chunksize": ROWS_AT_ONCE}
        options |= {"features": as_text, **DIALECT[format_]}
    with quiet():
        found = datasets.load_dataset(
            "csv" if format_ == "tsv" else format_, data_files=str(path), split="train", streaming=True, **options
        )
        yield from texts_of(found.iter(ROWS_AT_ONCE), column, str(path))


class quiet:  # noqa: N801 (reads as the context that it is)
    """Read one's own files without progress bars, without log lines, and without a word to a server."""

    def __enter__(self) -> None:
        import datasets

        datasets.disable_progress_bars()
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
        self._level = datasets.logging.get_verbosity()
        datasets.logging.set_verbosity(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        import datasets

        datasets.logging.set_verbosity(self._level)


def _by_hand(path: Path, column: str, reason: Exception, skip: int) -> Iterator[str | None]:
    """The rows after the first ``skip``, one by one."""
    format_ = FORMATS[_suffix(path)]
    with opened(path) as file:
        if format_ == "json":
            found = _json(file, path, column)
        elif format_ in SEPARATOR:
            found = _separated(file, path, column, format_)
        else:
            raise UserError(f"{path} cannot be read as {format_}: {_first_line(reason)}") from reason
        yield from islice(found, skip, None)


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise UserError(f"{path}: line {number:,} is longer than {LONGEST >> 20} MB")
            yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: line {number:,} is not UTF-8: it has the byte 0x{error.object[error.start]:02x}"
        ) from error
    except (EOFError, OSError) as error:
        raise UserError(f"{path} is cut off or damaged after line {number:,}: {_first_line(error)}") from error


def _json(file: IO[bytes], path: Path, column: str) -> Iterator[str | None]:
    first = True
    for number, line in _lines(file, path):
        if number == 1 and line.lstrip("\ufeff").lstrip().startswith("["):  # one list of all rows
            yield from _json_list(path, column)
            return
        if line.strip():
            try:
                row = json.loads(line.lstrip("\ufeff"))
            except ValueError as error:
                raise UserError(f"{path}: line {number:,} is not JSON: {_first_line(error)}") from error
            yield _field(row, column, f"{path}: line {number:,}", first)
            first = False


def _json_list(path: Path, column: str) -> Iterator[str | None]:
    with opened(path) as file:
        try:
            found = json.load(file)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path} is not JSON: {_first_line(error)}") from error
    for number, row in enumerate(found, 1):
        yield _field(row, column, f"{path}: row {number:,}", first=number == 1)


def _field(row: Any, column: str, where: str, first: bool) -> str | None:
    if not isinstance(row, dict):
        raise UserError(f"{where} is {type(row).__name__}, not an object with a '{column}'")
    if first:  # a later row may lack what has no value there
        _require(column, row, where)
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: '{column}' is {type(text).__name__}, not text")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: '{column}' has half a surrogate pair, which is no character") from error
    return text


def _separated(file: IO[bytes], path: Path, column: str, format_: str) -> Iterator[str]:
    lines = (line for _, line in _lines(file, path))
    reader = csv.reader(lines, delimiter=SEPARATOR[format_], strict=True, **DIALECT[format_])
    csv.field_size_limit(LONGEST)
    try:
        names = [name.removeprefix("\ufeff") for name in next(reader, [])]
        _require(column, names, str(path))
        first = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(names):
                raise UserError(f"{path}: line {first:,} has {len(row)} fields, not {len(names)} like the first")
            if row:
                yield row[names.index(column)]
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: line {first:,} cannot be read: {error}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
