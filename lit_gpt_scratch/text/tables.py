"""Files with a document a row: JSON lines, Parquet and Arrow, read by ``datasets``; CSV and TSV, read by ``csv``.

Where ``datasets`` stops in JSON lines, they are read on one by one: either that names the line which cannot be read, or
all are sound and only their types are not what ``datasets`` guessed (a column that comes late, a text like a date). Of
CSV, ``datasets`` and ``pandas`` below it lose text without a word, wherever a row has not as many fields as the first.
"""

import csv
import glob
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.compressed import COMPRESSED, DAMAGE, opened
from lit_gpt_scratch.text.document import LONGEST, Document

FORMATS: Final = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
NEVER_PROSE: Final = (".jsonl", ".ndjson", ".parquet", ".arrow")
"""Files with such names hold rows wherever they lie; the others may be somebody's text."""
ROWS_AT_ONCE: Final = 256


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
        require(column, batch, where)
        for text in batch[column]:
            number += 1
            if text is not None and not isinstance(text, str):
                raise TypeError(f"row {number:,}: '{column}' is {type(text).__name__}, not text")
            yield text


def require(column: str, columns: Iterable[str], where: str) -> None:
    """Refuse a column that is not there."""
    if column not in columns:
        there = ", ".join(columns) or "none"
        raise UserError(f"{where} has no column '{column}'; there is {there}; name one: --data.text_column")


def _texts(path: Path, column: str) -> Iterator[str | None]:
    import datasets
    import pyarrow.parquet

    format_ = FORMATS[_suffix(path)]
    if format_ in ("csv", "tsv") or _suffix(path) == ".json" or "::" in str(path):
        # Of a list in which texts and numbers are mixed, datasets would quote the texts; "::" means something to it.
        raise TypeError("not for datasets")
    options: dict[str, Any] = {}
    if format_ == "json":
        options = {"parse_agent_traces": False}
    if format_ == "parquet":
        require(column, pyarrow.parquet.read_schema(path).names, str(path))
        options = {"columns": [column], "batch_size": ROWS_AT_ONCE}
    with quiet():
        files = glob.escape(str(path))
        found = datasets.load_dataset(format_, data_files=files, split="train", streaming=True, **options)
        yield from texts_of(found.iter(ROWS_AT_ONCE), column, str(path))


@contextmanager
def quiet() -> Iterator[None]:
    """Read without progress bars, without log lines, and without a word to a server about one's own files."""
    import datasets

    level, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    counts, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if bars:
            datasets.enable_progress_bars()


def _by_hand(path: Path, column: str, reason: Exception, skip: int) -> Iterator[str | None]:
    """The rows after the first ``skip``, one by one."""
    format_ = FORMATS[_suffix(path)]
    readers = {"json": _json, "csv": _comma_separated, "tsv": _tab_separated}
    if format_ not in readers:
        raise UserError(f"{path} cannot be read as {format_}: {_first_line(reason)}") from reason
    try:
        file = opened(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    with file:
        yield from islice(readers[format_](file, path, column), skip, None)


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
    except DAMAGE as error:
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
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}: line {number:,} is not JSON: {_first_line(error)}") from error
            yield _field(row, column, f"{path}: line {number:,}", first)
            first = False


def _json_list(path: Path, column: str) -> Iterator[str | None]:
    with opened(path) as file:
        try:
            found = json.load(file)
        except (ValueError, RecursionError, *DAMAGE) as error:
            raise UserError(f"{path} is not JSON: {_first_line(error)}") from error
    for number, row in enumerate(found, 1):
        yield _field(row, column, f"{path}: row {number:,}", first=number == 1)


def _field(row: Any, column: str, where: str, first: bool) -> str | None:
    if not isinstance(row, dict):
        raise UserError(f"{where} is {type(row).__name__}, not an object with a '{column}'")
    if first:  # a later row may lack what has no value there
        require(column, row, where)
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: '{column}' is {type(text).__name__}, not text")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: '{column}' has half a surrogate pair, which is no character") from error
    return text


def _comma_separated(file: IO[bytes], path: Path, column: str) -> Iterator[str]:
    csv.field_size_limit(LONGEST)
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

    yield from _fields(numbered(), path, column)


def _tab_separated(file: IO[bytes], path: Path, column: str) -> Iterator[str]:
    """No quotes: a message that begins with one would swallow those after it."""
    rows = (
        (number, line.rstrip("\r\n").split("\t") if line.strip("\r\n") else []) for number, line in _lines(file, path)
    )
    yield from _fields(rows, path, column)


def _fields(rows: Iterator[tuple[int, list[str]]], path: Path, column: str) -> Iterator[str]:
    """One column of rows of fields, of which the first row has the names."""
    names = [name.removeprefix("\ufeff") for name in next(rows, (1, []))[1]]
    require(column, names, str(path))
    place = names.index(column)
    for number, row in rows:
        if row and len(row) != len(names):
            raise UserError(f"{path}: line {number:,} has {len(row)} fields, not {len(names)} like the first")
        if row:
            yield row[place]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
