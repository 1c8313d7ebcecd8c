"""Folders that are whole or not there."""

import multiprocessing
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from lit_gpt_scratch.errors import UserError


def whole_folder(folder: Path, fill: Callable[[Path], None], flag: str) -> None:
    """Make a folder unless it is there.

    It is filled beside its place and renamed when it is whole, so a kill leaves none or a good one; a lock, which a
    kill frees, keeps a second process from doing the same work; a full disk is left as it was found.

    Args:
        folder: To be there; an empty one counts as none.
        fill: Writes what is to be in it.
        flag: The flag that moves it elsewhere.

    Raises:
        UserError: It cannot be written.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError("a process that cleans text imports this script again: put if __name__ == '__main__': above")
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
            if folder.exists():
                return
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                fill(partial)
                for file in partial.rglob("*"):
                    if file.is_file():
                        with file.open("rb+") as handle:
                            os.fsync(handle.fileno())
                partial.rename(folder)
            except BaseException:  # whatever it is, Ctrl-C too: what is half written would only fill the disk
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except (OSError, sqlite3.OperationalError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to {folder.parent} ({said}); name another: {flag}") from error
