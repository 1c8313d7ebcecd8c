"""Where documents come from."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_gpt_scratch.errors import UserError

STDLIB = "stdlib"
"""The default source: the Python standard library's own sources, real text that is always there."""

# Not text that a person wrote (generated tables would be learned by heart, and their near-identical
# copies would stand on both sides of the split), tests, and what is not the standard library at all.
STDLIB_SKIPPED = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"
}  # fmt: skip
STDLIB_GENERATED = ("_sysconfigdata", "config-")


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name by which it can be found again."""

    id: str
    text: str


def documents(source: str) -> Iterator[Document]:
    """The documents of a source, one after the other, in a stable order.

    Args:
        source: ``stdlib``, the path of a UTF-8 text file (one document), or of a folder, in which every
            UTF-8 file is a document; hidden files and files that are not text are passed over.

    Raises:
        UserError: The path is missing, the file is no UTF-8 text, or there is no text at all.
    """
    if source == STDLIB:
        return _stdlib()
    path = Path(source).expanduser()
    if not source:
        raise UserError(f"data.source is empty; name a text file, a folder, or '{STDLIB}'")
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return iter([_file(path)])
    raise UserError(f"no such file or folder: {source} (data.source takes one, or '{STDLIB}')")


def _file(path: Path) -> Document:
    text = _decode(path)
    if text is None:
        raise UserError(f"{path} is not UTF-8 text; convert it, or name a text file as data.source")
    if not text.strip():
        raise UserError(f"{path} holds no text; name a file with text as data.source")
    return Document(path.name, text)


def _folder(root: Path) -> Iterator[Document]:
    return _tree(
        root,
        skipped=lambda folder: folder.startswith("."),
        wanted=lambda name: not name.startswith("."),
        nothing=f"no UTF-8 text file in {root}; name a folder with text files as data.source",
    )


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    return _tree(
        root,
        skipped=lambda folder: folder in STDLIB_SKIPPED or folder.startswith(STDLIB_GENERATED),
        wanted=lambda name: name.endswith(".py") and not name.startswith(STDLIB_GENERATED),
        nothing=f"this Python keeps no sources in {root}; name another text: --data.source FILE_OR_FOLDER",
    )


def _tree(
    root: Path, skipped: Callable[[str], bool], wanted: Callable[[str], bool], nothing: str
) -> Iterator[Document]:
    """Every wanted text file below ``root``, outside skipped folders; ``nothing`` is the complaint if none."""
    found = False
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not skipped(name))
        for path in (Path(folder, name) for name in sorted(names) if wanted(name)):
            if path.is_file() and (text := _decode(path)) and not text.isspace():
                found = True
                yield Document(path.relative_to(root).as_posix(), text)
    if not found:
        raise UserError(nothing)


def _decode(path: Path) -> str | None:
    """The file's text with every byte kept (no newline translation), or None where it is not UTF-8 text."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return None if "\0" in text else text
