"""Document sources: the Python standard library, files and folders, and datasets on the Hugging Face Hub."""

import fnmatch
import glob
import hashlib
import os
import re
import stat
import sysconfig
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import hub
from lit_gpt_scratch.text.document import MAX_DOCUMENT_BYTES, Document, RejectedDocument, TableRow, is_blank
from lit_gpt_scratch.text.file_readers import (
    READ_ERRORS,
    TABLE_FORMATS,
    Columns,
    is_table,
    open_decompressed,
    read_rows,
    row_to_document,
)

STDLIB: Final = "stdlib"
"""Name of the default source: the source code of the Python standard library, which requires no download."""

# Skipped folders and files contain generated text (a model would memorize its tables, and near-identical copies would
# end up in both splits), tests, or packages outside the standard library.
STDLIB_SKIPPED = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"
}  # fmt: skip
STDLIB_GENERATED = ("_sysconfigdata", "config-")

MAX_WHOLE_FILE_BYTES: Final = 2**22
"""Maximum size in bytes of a text file that is read as one document; larger files are read as several documents."""
CHUNK_BYTES: Final = 2**18
"""Size in bytes of the chunks into which a large file is split; each chunk is extended to the end of its last line."""


UnreadablePolicy = Literal["error", "skip"]
"""How to handle files and folders that cannot be read."""
OnUnreadable = Callable[[Path, "UnreadableError"], None]
"""Callback for files and folders that cannot be read; receives the path and the error, which it raises or records."""


class UnreadableError(UserError):
    """Raised if a file or folder cannot be read; ``reason`` excludes the path."""

    def __init__(self, path: Path | str, reason: str, advice: str = "") -> None:
        super().__init__(f"cannot read {path}: {reason}{advice}")
        self.reason = reason


def _raise_unreadable(path: Path, error: UnreadableError) -> None:
    raise error


@dataclass(frozen=True)
class DocumentSource:
    """Source of documents, which are read sequentially in a stable order.

    Args:
        name: ``stdlib``, a file, a folder, a pattern with ``*`` or ``**``, or a Hub dataset (``owner/name`` or
            ``owner/name@revision``). The suffix determines how a file is read: ``.jsonl``, ``.ndjson``, ``.json``,
            ``.csv``, ``.tsv``, ``.parquet`` and ``.arrow`` files contain one document per row; any other file is a
            single document of UTF-8 text. The suffix may be followed by ``.gz``, ``.zst``, ``.bz2`` or ``.xz``. In a
            folder, hidden files and files that are not text are skipped, and ``.json``, ``.csv`` and ``.tsv`` files are
            read as plain text. Links are followed, but a folder is read only once, even if several links refer to it.
        column: Name of the text column in tables.
        config: Configuration of a Hub dataset; None for the default configuration.
        split: Split of a Hub dataset.
        streaming: Whether to stream a Hub dataset instead of downloading it.
        unreadable: How to handle files, folders and broken links inside the source that cannot be read: ``error``
            raises an error; ``skip`` skips them, and ``read`` yields a ``RejectedDocument`` for each.
    """

    name: str
    column: str = "text"
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    unreadable: UnreadablePolicy = field(default="error", repr=False)  # the fingerprint covers what can be read

    def read(self) -> Iterator[Document | RejectedDocument]:
        """Yield every document, and a ``RejectedDocument`` for each document that is skipped.

        Raises:
            UserError: The source does not exist, lacks the text column, or contains unreadable data.
        """
        columns = {"text_column": self.column}
        if self.on_hub:
            yield from (row_to_document(row, self.column) for row in self.rows(columns))
            return
        skipped: list[RejectedDocument] = []
        for name, path in self._files(self._recorder(skipped)):
            yield from skipped
            skipped.clear()
            try:
                is_regular = _is_regular_file(path)
                if is_regular and self.unreadable == "skip":
                    _require_readable(path)
            except UnreadableError as error:
                if self.unreadable == "error" or path == self._path:
                    raise
                yield RejectedDocument(name, f"unreadable: {error.reason}")
                continue
            if not is_regular:  # a file in a folder; if it is the source, _files has raised an error
                yield RejectedDocument(name, "not text: a pipe, socket or device")
            elif is_table(path, in_folder=self._is_folder):
                yield from (row_to_document(row, self.column) for row in read_rows(path, name, columns))
            else:
                yield from self._read_text(name, path)
        yield from skipped

    def _recorder(self, skipped: list[RejectedDocument]) -> OnUnreadable:
        """Return the callback for unreadable folders, which adds them to ``skipped`` or raises the error."""

        def record(path: Path, error: UnreadableError) -> None:
            skipped.append(RejectedDocument(_document_name(path), f"unreadable: {error.reason}"))

        return record if self.unreadable == "skip" else _raise_unreadable

    def rows(self, columns: Columns | None = None) -> Iterator[TableRow]:
        """Yield all rows of the source; in a folder, files that are not tables are skipped.

        Args:
            columns: Columns to read; if None, all columns are read.

        Raises:
            UserError: The source does not exist, is not a table, lacks a column, or contains an unreadable row.
        """
        if self.on_hub:
            yield from hub.read_dataset_rows(self.name, columns, self.config, self.split, self.streaming)
            return
        files = [(name, path) for name, path in self._files() if _is_regular_file(path)]
        tables = [(name, path) for name, path in files if is_table(path, in_folder=False)]
        if not tables or (len(tables) < len(files) and not self._is_folder):
            raise UserError(
                f"{self.name} is not a table; use a Hub dataset or a file of type {', '.join(TABLE_FORMATS)}"
            )
        for name, path in tables:
            yield from read_rows(path, name, columns)

    def fingerprint(self, local: bool = False) -> str:
        """Return a string that changes when the source changes, without reading any files.

        The string is a hash of the names, sizes and modification times of all files, or the revision of a Hub dataset.

        Args:
            local: Whether to include absolute paths, inodes and change times. They distinguish copies of a file, and
                reveal that a file was replaced with another file of the same size and modification time.
        """
        if self.on_hub:
            return hub.dataset_revision(self.name, self.config)
        digest = hashlib.sha256()
        try:
            for name, path in self._files(self._recorder([])):
                try:
                    status = path.stat()
                except OSError:
                    if self.unreadable == "error" or path == self._path:
                        _is_regular_file(path)  # raises an error with advice
                        raise
                    digest.update(f"{name}\0unreadable\n".encode())
                    continue
                digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
                if local:
                    identity = f"{path.absolute()}\0{status.st_ino}\0{status.st_ctime_ns}\n"
                    digest.update(identity.encode(errors="replace"))
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
        return digest.hexdigest()

    @property
    def _path(self) -> Path:
        try:
            return Path(self.name).expanduser()
        except RuntimeError:  # ~name, but there is no user with this name
            return Path(self.name)

    @property
    def _is_folder(self) -> bool:
        return self.name == STDLIB or _folder_exists(self._path)

    @property
    def on_hub(self) -> bool:
        """Whether the source is a Hub dataset."""
        if self.name == STDLIB or not re.fullmatch(hub.DATASET_NAME, self.name):
            return False
        return _file_mode(self._path) is None

    def _files(self, on_unreadable: OnUnreadable = _raise_unreadable) -> Iterator[tuple[str, Path]]:
        """Yield the name and path of each file in the source.

        Args:
            on_unreadable: Callback for folders inside the source that cannot be read.

        Raises:
            UserError: The source does not exist or can be read only once, or a folder in it cannot be read.
        """
        if self.name == STDLIB:
            yield from _stdlib_files()
            return
        if not self.name:
            raise UserError(f"data.source is empty; set it to a text file, a folder, or '{STDLIB}'")
        mode = _file_mode(self._path)
        if mode is None:
            files = sorted({path for path in _expand_pattern(self._path, on_unreadable) if not _folder_exists(path)})
            if not files:
                raise UserError(
                    f"no such file or folder: {self.name}; set data.source to an existing one, or to '{STDLIB}'"
                ) from FileNotFoundError(self.name)
            root = Path(os.path.commonpath([path.parent for path in files]))
            yield from ((_document_name(path.relative_to(root)), path) for path in files)
        elif stat.S_ISDIR(mode):
            yield from _walk(
                self._path, lambda folder: folder.startswith("."), lambda name: not name.startswith("."), on_unreadable
            )
        elif stat.S_ISREG(mode):
            yield _document_name(Path(self._path.name)), self._path
        else:
            raise UserError(
                f"{self.name} is a pipe or device, which can be read only once; save its content to a file, and set "
                "data.source to this file"
            )

    def _read_text(self, name: str, path: Path) -> Iterator[Document | RejectedDocument]:
        try:
            for document in _read_text_file(name, path):
                if self._is_folder and "\0" in document.text:
                    yield RejectedDocument(document.id, "not text: NUL bytes", len(document.text.encode()))
                else:
                    yield document
        except NotTextError as error:
            if not self._is_folder:
                raise
            yield RejectedDocument(name, "not text: not UTF-8, or a line too long", error.n_bytes)
        except READ_ERRORS as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def read_documents(name: str, column: str = "text") -> Iterator[Document]:
    """Return an iterator over the documents of a source, omitting documents without text.

    Raises:
        UserError: The source does not exist or contains no text, or a document cannot be read.
    """
    source = DocumentSource(name, column)
    source.fingerprint()  # reports a missing source immediately, before the first document is read

    def read() -> Iterator[Document]:
        found = False
        for document in source.read():
            if isinstance(document, Document) and not is_blank(document.text):
                found = True
                yield document
        if not found:
            raise UserError(no_text_message(name)) from FileNotFoundError(name)

    return read()


def no_text_message(name: str) -> str:
    """Return the error message for a source that contains no text."""
    if name == STDLIB:
        return "the source code of the Python standard library is not installed; set --data.source to a file or folder"
    return f"{name} contains no text: no UTF-8 text file and no row with text; set data.source to another source"


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        return iter(())
    return _walk(
        root,
        skip_folder=lambda folder: folder in STDLIB_SKIPPED or folder.startswith(STDLIB_GENERATED),
        keep_file=lambda name: name.endswith(".py") and not name.startswith(STDLIB_GENERATED),
    )


def _file_mode(path: Path) -> int | None:
    """Return the type and permissions of a file or folder, following links, or None if it does not exist.

    Raises:
        UserError: The file or folder cannot be accessed.
    """
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL byte is a ValueError
        return None
    except OSError as error:
        raise UnreadableError(path, error.strerror or "unknown error") from error


def _require_readable(path: Path) -> None:
    """Check that a file can be opened.

    Raises:
        UnreadableError: The file cannot be opened.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise UnreadableError(path, error.strerror or "unknown error") from error


def _folder_exists(path: Path) -> bool:
    mode = _file_mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def _is_regular_file(path: Path) -> bool:
    """Return whether a path is a file that can be read repeatedly, unlike a pipe, socket or device.

    Raises:
        UserError: The path is a broken link.
    """
    mode = _file_mode(path)
    if mode is None:
        raise UnreadableError(path, "the link is broken", "; remove it, or set --data.unreadable to skip")
    return stat.S_ISREG(mode)


def _walk(
    root: Path,
    skip_folder: Callable[[str], bool],
    keep_file: Callable[[str], bool],
    on_unreadable: OnUnreadable = _raise_unreadable,
) -> Iterator[tuple[str, Path]]:
    """Yield the name and path of each file to keep under ``root``, without entering skipped folders."""
    for folder, names in _walk_folders(root, skip_folder, on_unreadable):
        for path in (folder / name for name in names if keep_file(name)):
            yield _document_name(path.relative_to(root)), path


def _walk_folders(
    root: Path, skip_folder: Callable[[str], bool], on_unreadable: OnUnreadable
) -> Iterator[tuple[Path, list[str]]]:
    """Yield a folder and, recursively, its subfolders, each with its sorted file names, following links.

    Each folder is visited once, even if links form a loop. Folders that can be reached without links are visited first,
    in sorted order, so that their paths contain no links.

    Raises:
        UserError: A folder cannot be read.
    """
    pending, links = [root], deque[Path]()
    visited: set[tuple[int, int]] = set()
    while pending or links:
        folder = pending.pop() if pending else links.popleft()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = sorted(((entry.name, entry.is_dir(), entry.is_symlink()) for entry in entries), reverse=True)
        except OSError as error:
            reason = error.strerror or "unknown error"
            advice = "; make it readable, or set --data.unreadable to skip"
            unreadable = UnreadableError(error.filename or folder, reason, advice)
            if folder == root:
                raise unreadable from error
            on_unreadable(folder.relative_to(root), unreadable)
            continue
        yield folder, [name for name, is_folder, _ in reversed(found) if not is_folder]
        folders = [
            (folder / name, is_link) for name, is_folder, is_link in found if is_folder and not skip_folder(name)
        ]
        pending += [path for path, is_link in folders if not is_link]
        links.extend(path for path, is_link in reversed(folders) if is_link)


def _expand_pattern(pattern: Path, on_unreadable: OnUnreadable = _raise_unreadable) -> Iterator[Path]:
    """Yield the files and folders that match a pattern with ``*``, ``?``, ``[...]`` and ``**``.

    Unlike ``glob.glob``, this function visits each folder in a link loop once, and reports folders that cannot be read.

    Raises:
        UserError: A folder cannot be read.
    """
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    yield from _expand_parts(Path(pattern.anchor), parts, on_unreadable)


def _expand_parts(folder: Path, parts: Sequence[str], on_unreadable: OnUnreadable) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if not glob.has_magic(part):
        if _file_mode(folder / part) is not None:
            yield from _expand_parts(folder / part, rest, on_unreadable)
        return
    if not _folder_exists(folder):
        return
    if part == "**":
        for inner, names in _walk_folders(folder, lambda name: name.startswith("."), on_unreadable):
            visible = (inner / name for name in names if not name.startswith("."))
            yield from _expand_parts(inner, rest, on_unreadable) if rest else visible
        return
    try:
        names = fnmatch.filter(os.listdir(folder), part)  # noqa: PTH208 (names)
    except OSError as error:
        advice = "; make it readable, or set --data.unreadable to skip"
        on_unreadable(folder, UnreadableError(folder, error.strerror or "unknown error", advice))
        return
    for name in names:
        if part.startswith(".") or not name.startswith("."):
            yield from _expand_parts(folder / name, rest, on_unreadable)


class NotTextError(UserError):
    """Raised if a file is not text; ``n_bytes`` is the file size."""

    def __init__(self, message: str, n_bytes: int) -> None:
        super().__init__(message)
        self.n_bytes = n_bytes


def _read_text_file(name: str, path: Path) -> Iterator[Document]:
    """Yield a text file as one document, or as several if the file is large; newlines are not converted."""
    with open_decompressed(path) as file:
        content = file.read(MAX_WHOLE_FILE_BYTES + 1)
        if len(content) <= MAX_WHOLE_FILE_BYTES:
            yield Document(name, _decode(content, path, 0))
            return
    for _ in _read_chunks(path):  # checks that the whole file is text before yielding its first document
        pass
    for number, text in enumerate(_read_chunks(path), 1):
        yield Document(f"{name}:{number}", text)


def _read_chunks(path: Path) -> Iterator[str]:
    n_lines = 0
    with open_decompressed(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            chunk += file.readline(MAX_DOCUMENT_BYTES)
            if len(chunk) >= MAX_DOCUMENT_BYTES:
                line = n_lines + chunk.count(b"\n") + 1
                message = f"{path}: line {line:,} is longer than {MAX_DOCUMENT_BYTES >> 20} MB; split it"
                raise NotTextError(message, _file_size(path))
            yield _decode(chunk, path, n_lines)
            n_lines += chunk.count(b"\n")


def _file_size(path: Path) -> int:
    """Return the size of a file on disk in bytes; for a compressed file, its compressed size."""
    return path.stat().st_size


def _document_name(path: Path) -> str:
    """Return a path as a valid Unicode string, replacing undecodable bytes."""
    return path.as_posix().encode(errors="replace").decode()


def _decode(content: bytes, path: Path, lines_before: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = lines_before + content.count(b"\n", 0, error.start) + 1
        message = f"{path} is not UTF-8 text (byte 0x{content[error.start]:02x} on line {line:,}); convert it to UTF-8"
        raise NotTextError(message, _file_size(path)) from error
