"""Atomic, checksummed checkpoint files.

A checkpoint is a file written by ``torch.save``, i.e. a zip archive. The checksum, a SHA-256 of the archive, is stored
in the archive comment, which other programs ignore.
"""

import hashlib
import logging
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.atomic_files import atomic_file

log = logging.getLogger(__name__)

CHECKSUM_PREFIX: Final = b"sha256:"
COMMENT_BYTES: Final = len(CHECKSUM_PREFIX) + 64
COMMENT_LENGTH: Final = struct.pack("<H", COMMENT_BYTES)
NO_COMMENT: Final = b"\0\0"
"""Comment length field of an archive without a comment, as written by ``torch.save``."""
END_RECORD_SIGNATURE: Final = b"PK\5\6"
END_RECORD_BYTES: Final = 22
"""Size in bytes of the last record of a zip archive, excluding the comment.

The record begins with ``END_RECORD_SIGNATURE``, and its last field is the length of the comment.
"""
READ_BYTES: Final = 1 << 20


_saving: dict[Path, bool] = {}
"""Maps the path of each checkpoint that this process is writing to whether it writes the checkpoint alone."""


def is_saving(alone: bool = False) -> bool:
    """Return whether this process is writing a checkpoint, in any thread.

    Args:
        alone: Whether to ignore checkpoints that several processes write together.
    """
    return any(_saving.values()) if alone else bool(_saving)


@contextmanager
def mark_saving(path: Path, alone: bool = True) -> Iterator[None]:
    """Context manager in which ``is_saving`` returns True.

    Args:
        path: Path to the checkpoint.
        alone: Whether no other process takes part in the save.
    """
    _saving[path] = alone
    try:
        yield
    finally:
        _saving.pop(path, None)


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint and its checksum to a file atomically.

    If the process is killed or the disk is full, the previous file is unchanged.

    Raises:
        UserError: The file cannot be written, or the checkpoint contains objects that could not be loaded again.
    """
    with mark_saving(path), explain_save_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            writer = _HashingWriter(file)
            torch.save(checkpoint, writer)  # type: ignore[arg-type]  # torch.save only calls write and flush
            _write_checksum(file, writer.digest.hexdigest())
            _reject_unsafe_globals(Path(file.name), path)


@contextmanager
def explain_save_errors(path: Path) -> Iterator[None]:
    """Context manager that turns errors of the operating system while a checkpoint is written into a ``UserError``."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer turns an OSError into a RuntimeError
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
        reason = cause.strerror if isinstance(cause, OSError) else str(cause).splitlines()[0]
        raise UserError(f"cannot save {path}: {reason}; the previous checkpoint is unchanged") from error


def append_checksum(file: BinaryIO) -> None:
    """Add the checksum to an archive that ``torch.save`` has written; the file must be opened for reading, too."""
    _write_checksum(file, _compute_checksum(file, file.seek(0, os.SEEK_END) + COMMENT_BYTES))


def _write_checksum(file: BinaryIO, checksum: str) -> None:
    """Replace the empty comment at the end of an archive by a checksum."""
    file.seek(-len(NO_COMMENT), os.SEEK_END)
    file.write(COMMENT_LENGTH + CHECKSUM_PREFIX + checksum.encode())
    file.flush()


def _reject_unsafe_globals(partial: Path, path: Path) -> None:
    """Raise an error if a checkpoint contains objects other than tensors and plain data, e.g. in a callback's state.

    Such a file could not be loaded again, because checkpoints are loaded with ``weights_only=True``.
    """
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(partial):
        raise UserError(
            f"cannot save {path}: it would contain {', '.join(sorted(unsafe))}, but only tensors and plain data can be "
            "loaded again; check the state_dict of your callbacks (the previous checkpoint is unchanged)"
        )


def verify_checksum(path: Path) -> bool:
    """Verify a checkpoint's checksum. A file without a checksum, e.g. one saved by a plain Trainer, is accepted.

    Returns:
        True if the file has a checksum, False otherwise.

    Raises:
        UserError: The checksum does not match, or the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - END_RECORD_BYTES))
            end = file.read()
            if end[:4] == END_RECORD_SIGNATURE and end.endswith(NO_COMMENT):
                return False
            file.seek(max(0, size - len(COMMENT_LENGTH) - COMMENT_BYTES))
            if file.read() != COMMENT_LENGTH + CHECKSUM_PREFIX + _compute_checksum(file, size).encode():
                raise UserError(
                    f"{path} is not a checkpoint, or is corrupted: its checksum does not match; use another file"
                )
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}; check the path") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from error
    return True


def require_plain_archive(path: Path) -> None:
    """Check that the records of a checkpoint are neither compressed nor overlapping, as in a file from ``torch.save``.

    Otherwise, loading a small file could require any amount of memory.

    Raises:
        UserError: The file is not an archive of uncompressed records.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # reading an arbitrary file can raise anything
        raise UserError(f"{path} is not a checkpoint, or is corrupted; use another file") from error
    compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    if compressed or sum(record.file_size for record in records) > path.stat().st_size:
        raise UserError(f"{path} is not a checkpoint: its records are compressed or overlap; use another file")


def load_archive(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU, after verifying its checksum, without running code from it.

    Args:
        path: Path to the file.
        mapped: Whether to map the tensors into memory, so that they are read when they are accessed.

    Raises:
        UserError: The file is missing, corrupted, or not a checkpoint.
    """
    if not verify_checksum(path):
        log.warning("%s has no checksum, because another program wrote it; corruption cannot be detected", path)
    require_plain_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # reading an arbitrary file can raise anything
        raise UserError(f"{path} is not a checkpoint, or is corrupted; use another file") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is not a checkpoint of lit_gpt_scratch; use a checkpoint written by fit")
    return loaded


def _compute_checksum(file: BinaryIO, size: int) -> str:
    """Compute the SHA-256, in hexadecimal, of the archive as it was before the comment was appended."""
    digest = hashlib.sha256()
    file.seek(0)
    left = size - COMMENT_BYTES - len(COMMENT_LENGTH)
    while left > 0:
        chunk = file.read(min(READ_BYTES, left))
        digest.update(chunk)
        left -= len(chunk)
    digest.update(NO_COMMENT)
    return digest.hexdigest()


class _HashingWriter:
    """File wrapper that computes the SHA-256 of the data written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write data to the file and add it to the hash."""
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Flush the underlying file."""
        self.file.flush()
