"""Files of rows with named columns: Parquet, Arrow and texts in JSON lines, read by ``datasets``; the others by hand.

Where ``datasets`` stops in JSON lines, they are read on one by one: either that names the line which cannot be read, or
all are sound and only their types are not what ``datasets`` guessed (a column that comes late, a text like a date). Of
CSV, ``datasets`` and ``pandas`` below it lose text without a word, wherever a row has not as many fields as the first.
"""

import glob
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.decompress import DECOMPRESSORS, open_decompressed
from lit_gpt_scratch.text.document import MAX_DOCUMENT_BYTES, ClassIndex, Document, TableRow, get_text
from lit_gpt_scratch.text.row_readers import READERS, Columns, Fields, first_line, require_columns

TABLE_FORMATS: Final = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
ALWAYS_TABLES: Final = (".jsonl", ".ndjson", ".parquet", ".arrow")
"""Files with such names hold rows wherever they lie; the others may be somebody's text."""
BATCH_ROWS: Final = 256


def rows(path: Path, name: str, columns: Columns | None) -> Iterator[TableRow]:
    """The rows of a file; ``name:3`` is the third.

    Raises:
        UserError: There is no such column, or a row that cannot be read.
    """
    read = 0
    try:
        for fields in _by_datasets(path, columns):
            read += 1
            yield TableRow(f"{name}:{read}", f"{path}: row {read:,}", fields)
        return
    except UserError:
        raise
    except Exception as error:  # whatever the readers of five formats raise
        reason = error
    for number, (where, fields) in enumerate(_rest(path, columns, reason, skip=read), read + 1):
        yield TableRow(f"{name}:{number}", where, fields)


def document(row: TableRow, column: str) -> Document:
    """The text in a column of a row; without any it is an empty document.

    Raises:
        UserError: There is something else, or it is longer than any text.
    """
    try:
        text = get_text(row.fields, column)
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    if len(text) > MAX_DOCUMENT_BYTES:
        raise UserError(f"{row.where} has a text of {len(text) >> 20} MB; {MAX_DOCUMENT_BYTES >> 20} is the most")
    return Document(row.id, text)


def is_table(path: Path, in_folder: bool) -> bool:
    """Whether a file holds rows, by its name; in a folder, ``.json`` and ``.csv`` are texts."""
    suffix = _suffix(path)
    return suffix in (ALWAYS_TABLES if in_folder else TABLE_FORMATS)


def _suffix(path: Path) -> str:
    inner = path.with_suffix("") if path.suffix.lower() in DECOMPRESSORS else path
    return inner.suffix.lower()


def iterate_dataset(found: Any, columns: Columns | None, where: str) -> Iterator[Fields]:
    """A dataset of ``datasets`` as rows; numbers of classes know their names.

    Raises:
        UserError: There is no such column.
    """
    from datasets import ClassLabel

    classes = {name: kind.names for name, kind in (found.features or {}).items() if isinstance(kind, ClassLabel)}
    for batch in found.iter(BATCH_ROWS):
        require_columns(columns, batch, where)
        for name in classes.keys() & batch.keys():
            numbers = batch[name]
            batch[name] = [None if each is None else ClassIndex.of(each, classes[name]) for each in numbers]
        names = list(batch if columns is None else columns.values())
        for values in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))


def _by_datasets(path: Path, columns: Columns | None) -> Iterator[Fields]:
    import datasets
    import pyarrow.parquet

    format_ = TABLE_FORMATS[_suffix(path)]
    whole = columns is None or len(columns) > 1
    if format_ in ("csv", "tsv") or (format_ == "json" and whole) or _suffix(path) == ".json" or "::" in str(path):
        # Of a list in which texts and numbers are mixed, datasets would quote the texts, and of lists of objects it may
        # make objects; "::" means something to it.
        raise TypeError("not for datasets")
    options: dict[str, Any] = {}
    if format_ == "json":
        options = {"parse_agent_traces": False}
    if format_ == "parquet":
        require_columns(columns, pyarrow.parquet.read_schema(path).names, str(path))
        options = {"columns": list(columns.values()) if columns else None, "batch_size": BATCH_ROWS}
    with quiet_datasets():
        files = glob.escape(str(path))
        found = datasets.load_dataset(format_, data_files=files, split="train", streaming=True, **options)
        for fields in iterate_dataset(found, columns, str(path)):
            if format_ == "json" and not all(isinstance(value, str | None) for value in fields.values()):
                raise TypeError("a text was taken for a date, or there is none")
            yield fields


@contextmanager
def quiet_datasets() -> Iterator[None]:
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


def _rest(path: Path, columns: Columns | None, reason: Exception, skip: int) -> Iterator[tuple[str, Fields]]:
    """The rows after the first ``skip``, one by one, each with its place in the file."""
    format_ = TABLE_FORMATS[_suffix(path)]
    if format_ not in READERS:
        raise UserError(f"{path} cannot be read as {format_}: {first_line(reason)}") from reason
    try:
        file = open_decompressed(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    with file:
        yield from islice(READERS[format_](file, path, columns), skip, None)
