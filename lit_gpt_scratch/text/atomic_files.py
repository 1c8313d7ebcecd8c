"""Atomic creation of files and folders: even if the process is killed, they are either complete or missing."""

import multiprocessing
import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from filelock import FileLock

from lit_gpt_scratch.errors import UserError

PURPOSE_FILE: Final = "begun"
"""Name of the file that stores the ``purpose`` of an incomplete folder; see ``create_folder_atomically``."""
TEMPORARY_NAME: Final = ".{name}.{writer}.unfinished"


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file next to ``path``; on success, flush it to disk and rename it to ``path``."""
    temporary = path.with_name(TEMPORARY_NAME.format(name=path.name, writer=secrets.token_hex(4)))
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def create_folder_atomically(folder: Path, fill: Callable[[Path], None], flag: str, purpose: str | None = None) -> None:
    """Create a folder atomically, unless it already exists.

    The folder is filled under a temporary name and renamed once it is complete, so a killed process leaves either no
    folder or a complete folder. A lock prevents a second process from doing the same work; the lock is released if the
    process that holds it is killed. On failure, the partial folder is deleted to free disk space.

    Args:
        folder: Folder to create; an existing empty folder is treated as missing.
        fill: Function that receives the temporary path of the folder and writes the contents of the folder.
        flag: Command-line flag that sets the location of the folder, for error messages.
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
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
            if not folder.exists():
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

    The folder must not exist, and no other process may write to it.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    purpose_file = partial / PURPOSE_FILE
    if purpose is None or not purpose_file.is_file() or purpose_file.read_text(encoding="utf-8") != purpose:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if purpose is not None:
            with atomic_file(purpose_file) as file:
                file.write(purpose.encode())
    for leftover in partial.rglob(TEMPORARY_NAME.format(name="*", writer="*")):  # left by a killed process
        leftover.unlink(missing_ok=True)
    try:
        fill(partial)
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        purpose_file.unlink(missing_ok=True)
        partial.rename(folder)
    except BaseException as error:  # includes Ctrl-C; a folder that cannot be resumed wastes disk space
        interrupted = isinstance(error, BrokenProcessPool) or not isinstance(error, Exception)
        if purpose is None or not interrupted:
            shutil.rmtree(partial, ignore_errors=True)
        raise
