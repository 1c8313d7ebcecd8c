"""Where documents come from: this Python's own library, files and folders, or the Hub."""

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import hub, tables
from lit_gpt_scratch.text.decompress import READ_ERRORS, open_decompressed
from lit_gpt_scratch.text.document import MAX_DOCUMENT_BYTES, Document, RejectedDocument, TableRow, is_blank
from lit_gpt_scratch.text.row_readers import Columns

STDLIB: Final = "stdlib"
"""The default source: the Python standard library's own sources, real text that is always there."""

# Not text that a person wrote (generated tables would be learned by heart, and their near-identical
# copies would stand on both sides of the split), tests, and what is not the standard library at all.
STDLIB_SKIPPED = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"
}  # fmt: skip
STDLIB_GENERATED = ("_sysconfigdata", "config-")

MAX_WHOLE_FILE_BYTES: Final = 2**22
"""Bytes: a text file that is longer is read as many documents."""
CHUNK_BYTES: Final = 2**18
"""Bytes of such a document, up to the next line's end."""


@dataclass(frozen=True)
class DocumentSource:
    """Documents by the name of their place, one after the other, in a stable order.

    Args:
        name: ``stdlib``; a file, a folder, or a pattern with ``*`` and ``**``; or a dataset of the Hub as
            ``owner/name`` or ``owner/name@revision``. A file is read by how its name ends: ``.jsonl``, ``.json``,
            ``.csv``, ``.tsv``, ``.parquet`` and ``.arrow`` hold a document a row, any other is a UTF-8 text and
            one document; ``.gz``, ``.zst``, ``.bz2`` and ``.xz`` may follow. In a folder, every file that is not
            hidden is read; there ``.json``, ``.csv`` and ``.tsv`` are texts like any other, and files that are no
            text are passed over.
        column: The column with the text, where there are columns.
        config: A dataset's configuration, where the Hub has several.
        split: A dataset's split, on the Hub.
        streaming: Read a dataset of the Hub as it comes, without keeping a copy of it.
    """

    name: str
    column: str = "text"
    config: str | None = None
    split: str = "train"
    streaming: bool = False

    def read(self) -> Iterator[Document | RejectedDocument]:
        """Every document, and what was passed over.

        Raises:
            UserError: The source is missing, is not what its name says, or has a row that cannot be read.
        """
        columns = {"text_column": self.column}
        if self.on_hub:
            yield from (tables.document(row, self.column) for row in self.rows(columns))
            return
        for name, path in self._files():
            if tables.is_table(path, in_folder=self._of_folder):
                yield from (tables.document(row, self.column) for row in tables.rows(path, name, columns))
            else:
                yield from self._text(name, path)

    def rows(self, columns: Columns | None = None) -> Iterator[TableRow]:
        """Every row, with these columns or all; a folder's files without rows are passed over.

        Raises:
            UserError: The source is missing, has no rows, lacks a column, or has a row that cannot be read.
        """
        if self.on_hub:
            yield from hub.rows(self.name, columns, self.config, self.split, self.streaming)
            return
        files = list(self._files())
        tabular = [(name, path) for name, path in files if tables.is_table(path, in_folder=False)]
        if not tabular or (len(tabular) < len(files) and not self._of_folder):
            raise UserError(
                f"{self.name} holds no rows; name a file of {', '.join(tables.TABLE_FORMATS)}, or a dataset"
            )
        for name, path in tabular:
            yield from tables.rows(path, name, columns)

    def stamp(self, here: bool = False) -> str:
        """What changes when the source does, without reading it: names, sizes and times of files, or a revision.

        Args:
            here: Tell copies apart, too, and files that were put in the place of others of the same size and time.
        """
        if self.on_hub:
            return hub.stamp(self.name, self.config)
        facts = hashlib.sha256()
        try:
            for name, path in self._files():
                about = path.stat()
                facts.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
                if here:
                    facts.update(f"{path.absolute()}\0{about.st_ino}\0{about.st_ctime_ns}\n".encode(errors="replace"))
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
        return facts.hexdigest()

    @property
    def _path(self) -> Path:
        return Path(self.name).expanduser()

    @property
    def _of_folder(self) -> bool:
        return self.name == STDLIB or self._path.is_dir()

    @property
    def on_hub(self) -> bool:
        """Whether the name is of a dataset of the Hub."""
        return self.name != STDLIB and bool(re.fullmatch(hub.DATASET_NAME, self.name)) and not self._path.exists()

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Names and paths of the source's files."""
        if self.name == STDLIB:
            yield from _stdlib()
        elif not self.name:
            raise UserError(f"data.source is empty; name a text file, a folder, or '{STDLIB}'")
        elif self._path.is_dir():
            yield from _tree(self._path, lambda folder: folder.startswith("."), lambda name: not name.startswith("."))
        elif self._path.exists():
            yield _name(Path(self._path.name)), self._path
        else:
            found = sorted({Path(path) for path in glob.glob(str(self._path), recursive=True)})  # noqa: PTH207 (absolute)
            files = [path for path in found if path.is_file()]
            if not files:
                raise UserError(f"no such file or folder: {self.name} (data.source takes one, or '{STDLIB}')")
            root = Path(os.path.commonpath([path.parent for path in files]))
            yield from ((_name(path.relative_to(root)), path) for path in files)

    def _text(self, name: str, path: Path) -> Iterator[Document | RejectedDocument]:
        try:
            for document in _documents_of(name, path):
                if self._of_folder and "\0" in document.text:
                    yield RejectedDocument(document.id, "not text: NUL bytes", len(document.text.encode()))
                else:
                    yield document
        except NotTextError as error:
            if not self._of_folder:
                raise
            yield RejectedDocument(name, "not text: not UTF-8, or not in lines", error.n_bytes)
        except READ_ERRORS as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def read_documents(name: str, column: str = "text") -> Iterator[Document]:
    """The documents of a source that need no more than its name and the column with the text.

    Raises:
        UserError: There is none, or one cannot be read.
    """
    source = DocumentSource(name, column)
    source.stamp()  # a source that is not there is said to be missing at once

    def read() -> Iterator[Document]:
        found = False
        for document in source.read():
            if isinstance(document, Document) and not is_blank(document.text):
                found = True
                yield document
        if not found:
            raise UserError(no_text_message(name))

    return read()


def no_text_message(name: str) -> str:
    """What to say of a source without a document."""
    if name == STDLIB:
        return "this Python keeps no sources of its library; name another text: --data.source FILE_OR_FOLDER"
    return f"{name} holds no text: no UTF-8 text file, no row with text; name another data.source"


def _stdlib() -> Iterator[tuple[str, Path]]:
    return _tree(
        Path(sysconfig.get_path("stdlib")),
        skipped=lambda folder: folder in STDLIB_SKIPPED or folder.startswith(STDLIB_GENERATED),
        wanted=lambda name: name.endswith(".py") and not name.startswith(STDLIB_GENERATED),
    )


def _tree(root: Path, skipped: Callable[[str], bool], wanted: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    """Every wanted file below ``root``, outside skipped folders."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not skipped(name))
        for path in (Path(folder, name) for name in sorted(names) if wanted(name)):
            if path.is_file():
                yield _name(path.relative_to(root)), path


class NotTextError(UserError):
    """A file that holds something else, ``n_bytes`` of it."""

    def __init__(self, why: str, n_bytes: int) -> None:
        super().__init__(why)
        self.n_bytes = n_bytes


def _documents_of(name: str, path: Path) -> Iterator[Document]:
    """A text file as one document with every byte kept (no newline translation), or as several if it is long."""
    with open_decompressed(path) as file:
        content = file.read(MAX_WHOLE_FILE_BYTES + 1)
        if len(content) <= MAX_WHOLE_FILE_BYTES:
            yield Document(name, _decode(content, path, 0))
            return
    for _ in _pieces(path):  # all of it is text, before any of it is taken
        pass
    for number, text in enumerate(_pieces(path), 1):
        yield Document(f"{name}:{number}", text)


def _pieces(path: Path) -> Iterator[str]:
    lines = 0
    with open_decompressed(path) as file:
        while piece := file.read(CHUNK_BYTES):
            piece += file.readline(MAX_DOCUMENT_BYTES)
            if len(piece) >= MAX_DOCUMENT_BYTES:
                line = lines + piece.count(b"\n") + 1
                raise NotTextError(
                    f"{path}: line {line:,} is longer than {MAX_DOCUMENT_BYTES >> 20} MB; break it", _size(path)
                )
            yield _decode(piece, path, lines)
            lines += piece.count(b"\n")


def _size(path: Path) -> int:
    """Bytes of a file, as it lies there."""
    return path.stat().st_size


def _name(path: Path) -> str:
    """A relative path as text, though its bytes may be none."""
    return path.as_posix().encode(errors="replace").decode()


def _decode(content: bytes, path: Path, lines_before: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = lines_before + content.count(b"\n", 0, error.start) + 1
        why = f"{path} is not UTF-8 text: line {line:,} has the byte 0x{content[error.start]:02x}; convert it"
        raise NotTextError(why, _size(path)) from error
