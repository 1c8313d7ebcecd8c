"""Files and folders that are whole or not there."""

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
"""A file in a folder that is being filled, with what it is filled for."""
TEMPORARY_NAME: Final = ".{name}.{writer}.unfinished"


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file beside its place, and put it there when all of it is on the disk."""
    unfinished = path.with_name(TEMPORARY_NAME.format(name=path.name, writer=secrets.token_hex(4)))
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def create_folder_atomically(folder: Path, fill: Callable[[Path], None], flag: str, purpose: str | None = None) -> None:
    """Make a folder unless it is there.

    It is filled beside its place and renamed when it is whole, so a kill leaves none or a good one; a lock, which a
    kill frees, keeps a second process from doing the same work; a full disk is left as it was found.

    Args:
        folder: To be there; an empty one counts as none.
        fill: Writes what is to be in it.
        flag: The flag that moves it elsewhere.
        purpose: What it is made of. If given, what a filling for the same purpose has left that was interrupted, by a
            kill, Ctrl-C or the end of a process that helped, is handed to ``fill`` again, to go on with; by default it
            begins anew.

    Raises:
        UserError: It cannot be written, or a process that helped was killed.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError("a process that cleans text imports this script again: put if __name__ == '__main__': above")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
            if not folder.exists():
                fill_folder_atomically(folder, fill, purpose)
    except BrokenProcessPool as error:
        kept = "the same command goes on" if purpose is not None else "try again"
        raise UserError(
            f"a process that worked on {folder.name} was killed, perhaps for want of memory; {kept}; fewer processes "
            "take less: --data.processes 1"
        ) from error
    except (OSError, sqlite3.OperationalError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {folder.parent} ({said}); name another: {flag}") from error


def fill_folder_atomically(folder: Path, fill: Callable[[Path], None], purpose: str | None = None) -> None:
    """``create_folder_atomically`` for a folder that is not there and that no other process makes."""
    partial = folder.with_name(f"{folder.name}.partial")
    begun = partial / PURPOSE_FILE
    if purpose is None or not begun.is_file() or begun.read_text(encoding="utf-8") != purpose:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        if purpose is not None:
            with atomic_file(begun) as note:
                note.write(purpose.encode())
    for left in partial.rglob(TEMPORARY_NAME.format(name="*", writer="*")):  # by a writer that was killed
        left.unlink(missing_ok=True)
    try:
        fill(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        begun.unlink(missing_ok=True)
        partial.rename(folder)
    except BaseException as error:  # whatever it is: what cannot be gone on with would only fill the disk
        interrupted = isinstance(error, BrokenProcessPool) or not isinstance(error, Exception)
        if purpose is None or not interrupted:
            shutil.rmtree(partial, ignore_errors=True)
        raise
