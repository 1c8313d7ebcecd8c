"""Create files and folders atomically: even if the process is killed, they are either complete or missing.

Each file or folder is first written under a temporary name in the same parent folder and then renamed. A symbolic link
at the final path is therefore replaced, and its target is left unchanged. Temporary names are random and are created
exclusively, so no existing file is opened and no link is followed. A killed process leaves its temporary files behind.
The next process recognizes them by a checksum in their names, and removes only these files.
"""

import hashlib
import multiprocessing
import os
import re
import secrets
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from filelock import FileLock

from lit_gpt_scratch.errors import UserError

if os.name == "posix":
    import fcntl

PURPOSE_FILE: Final = "begun"
"""Name of the file that stores the ``purpose`` of an incomplete folder; see ``create_folder_atomically``."""
UNFINISHED: Final = re.compile(r"\.(.*)\.([0-9a-f]{16})([0-9a-f]{16})\.unfinished", re.DOTALL)
"""Pattern of temporary names: the first characters of the final name, a random token, and a checksum of both."""
KEPT_CHARACTERS: Final = 40
"""Maximum number of characters of the final name to keep in a temporary name; file systems limit the length of
names."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file next to ``path``; on success, flush it to disk and rename it to ``path``.

    The new file has the same permissions as the file that it replaces, or default permissions (umask) if there is none.
    """
    for leftover in find_unfinished(path.parent, path.name):
        _remove_if_unused(leftover)
    file = _create_locked(path)
    temporary = Path(file.name)
    try:
        with file:
            with suppress(FileNotFoundError):
                if stat.S_ISREG(mode := path.lstat().st_mode):
                    temporary.chmod(stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # an open file cannot be renamed
                file.close()
            temporary.replace(path)  # before closing the file, which releases its lock
    finally:
        temporary.unlink(missing_ok=True)
    sync_to_disk(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically; a string is encoded as UTF-8."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def create_folder_atomically(folder: Path, fill: Callable[[Path], None], flag: str, purpose: str | None = None) -> None:
    """Create a folder atomically, unless it already exists.

    The folder is filled under a temporary name and renamed once it is complete, so a killed process leaves either no
    folder or a complete folder. A lock prevents a second process from doing the same work; the lock is released if the
    process that holds it is killed. On failure, the partial folder is deleted to free disk space.

    Args:
        folder: Folder to create. If a non-empty folder already exists, it is left unchanged.
        fill: Function that receives the temporary path of the folder and writes the files in it.
        flag: Command-line flag that sets the location of the folder, used in error messages.
        purpose: String that identifies the inputs from which the folder is created. If set, the partial folder is kept
            if the call is interrupted (the process or one of its workers is killed, or Ctrl-C is pressed), and the next
            call with the same purpose passes this folder to ``fill``, which can complete it. If None, the next call
            starts over.

    Raises:
        UserError: The folder is not writable, or a worker process was killed.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError("worker processes import the main script; move its code under if __name__ == '__main__':")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
                fill_folder_atomically(folder, fill, purpose)
    except BrokenProcessPool as error:
        retry = "run the same command again to resume" if purpose is not None else "run the command again"
        raise UserError(
            f"a worker process for {folder.name} was killed, possibly because it ran out of memory; {retry}, with "
            "--data.processes 1 to use less memory"
        ) from error
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {folder.parent} ({reason}); set {flag} to another folder") from error


def fill_folder_atomically(folder: Path, fill: Callable[[Path], None], purpose: str | None = None) -> None:
    """Create a folder atomically without a lock; see ``create_folder_atomically`` for the arguments.

    The folder must be missing or empty, and no other process may write to it.
    """
    partial = None
    for leftover in find_unfinished(folder.parent, folder.name):
        if partial is None and purpose is not None and _read_purpose(leftover) == purpose:
            partial = leftover
        else:
            shutil.rmtree(leftover, ignore_errors=True)
    if partial is None:
        partial = _temporary_path(folder)
        partial.mkdir()
        if purpose is not None:
            write_atomically(partial / PURPOSE_FILE, purpose)
    try:
        fill(partial)
        remove_unfinished(partial)
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        (partial / PURPOSE_FILE).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            folder.rmdir()  # it is empty
        partial.rename(folder)
    except BaseException as error:  # includes Ctrl-C; a folder that cannot be resumed wastes disk space
        interrupted = isinstance(error, BrokenProcessPool) or not isinstance(error, Exception)
        if purpose is None or not interrupted:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_to_disk(folder.parent)


def is_unfinished(path: Path) -> bool:
    """Return whether a path has a temporary name generated by this module."""
    return _final_name(path) is not None


def find_unfinished(folder: Path, name: str | None = None) -> list[Path]:
    """Return the temporary files and subfolders that running or killed processes have left in a folder.

    Args:
        folder: Folder to search; may be missing.
        name: Name that the file or folder has once it is complete; None matches all names.
    """
    if not folder.is_dir():
        return []
    prefix = "." if name is None else f".{name[:KEPT_CHARACTERS]}."
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(prefix) and not entry.is_symlink()]
    return [path for path in found if is_unfinished(path) and (name is None or _final_name(path) == prefix[1:-1])]


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files in a folder and its subfolders, unless another process is still writing to them."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]:
        for leftover in find_unfinished(path):
            _remove_if_unused(leftover)


def _final_name(path: Path) -> str | None:
    """Return a temporary path's final name, truncated to ``KEPT_CHARACTERS``, or None for any other path."""
    match = UNFINISHED.fullmatch(path.name)
    return match[1] if match and name_checksum(match[1], match[2]) == match[3] else None


def _temporary_path(path: Path) -> Path:
    name, token = path.name[:KEPT_CHARACTERS], secrets.token_hex(8)
    return path.with_name(f".{name}.{token}{name_checksum(name, token)}.unfinished")


def name_checksum(name: str, token: str) -> str:
    """Return the checksum that is part of a generated name, by which this program recognizes its own files."""
    return hashlib.sha256(f"lit_gpt_scratch {token} {name}".encode(errors="surrogateescape")).hexdigest()[:16]


def _create_locked(path: Path) -> BinaryIO:
    """Create a temporary file that is locked while it is open, so that no other process removes it."""
    while True:
        file = _temporary_path(path).open("x+b")  # exclusive: fails if the name exists, even as a dangling link
        if _try_lock(file.fileno()) is not False and os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process removed the file before it was locked


def _remove_if_unused(leftover: Path) -> None:
    """Remove a temporary file, unless the process that created it is still writing to it."""
    if not leftover.is_file():
        return
    with suppress(OSError):
        if os.name == "nt":
            leftover.unlink()  # fails if the file is open
            return
        descriptor = os.open(leftover, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if _try_lock(descriptor):
                leftover.unlink()
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool | None:
    """Lock an open file; return False if another process has locked it, and None if it cannot be locked."""
    if os.name != "posix":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system does not support locks
        return None
    return True


def _read_purpose(partial: Path) -> str | None:
    try:
        return (partial / PURPOSE_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def sync_to_disk(path: Path) -> None:
    """Flush a file or folder to disk, if possible, so that a power failure cannot undo its writes or renames."""
    if os.name == "posix":
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
