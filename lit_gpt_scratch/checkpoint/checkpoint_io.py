"""Checkpoint files that are whole or not there, and that tell when they were altered.

A checkpoint of torch is a zip archive, and a zip archive ends with a comment. The seal is that comment: the SHA-256
of all that is before it. It travels with the file, and whatever reads the archive otherwise passes over it.
"""

import hashlib
import os
import struct
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from typing_extensions import override

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.lightning_compat import SingleThreadCheckpointIO

CHECKSUM_PREFIX: Final = b"sha256:"
COMMENT_BYTES: Final = len(CHECKSUM_PREFIX) + 64
COMMENT_LENGTH: Final = struct.pack("<H", COMMENT_BYTES)
END_RECORD_SIGNATURE: Final = b"PK\5\6"
END_RECORD_BYTES: Final = 22
NO_COMMENT: Final = b"\0\0"
"""A zip archive's last record begins with ``END_RECORD_SIGNATURE`` and ends with the length of the comment."""
READ_BYTES: Final = 1 << 20
PARTIAL_SUFFIX: Final = ".part"
"""Ending of a file that is being written."""


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint and its seal; a kill or a full disk at any moment leaves the file that was there before.

    Raises:
        UserError: It cannot be written, or could not be loaded again.
    """
    # In the same folder: across file systems a rename would copy.
    unfinished = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            hashing = _HashingWriter(file)
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # it only writes and flushes
            file.seek(-len(NO_COMMENT), os.SEEK_CUR)
            file.write(COMMENT_LENGTH + CHECKSUM_PREFIX + hashing.digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        _reject_unsafe_globals(unfinished, path)
        unfinished.replace(path)
    except UserError:
        unfinished.unlink()
        raise
    except (OSError, RuntimeError) as error:  # torch's writer turns one into the other
        with suppress(OSError):
            unfinished.unlink()
        cause = next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), error)
        reason = cause.strerror if isinstance(cause, OSError) else str(cause).splitlines()[0]
        raise UserError(f"cannot save {path}: {reason}; what was saved before is as it was") from error
    if os.name == "posix":  # the rename, too, should outlast a loss of power, where the file system can promise that
        with suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _reject_unsafe_globals(unfinished: Path, path: Path) -> None:
    """Loading takes tensors and plain data alone; a callback of the user's own may have put something else in."""
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(unfinished):
        raise UserError(
            f"cannot save {path}: it would hold {', '.join(sorted(unsafe))}, and only tensors and plain data are "
            "loaded again (look at the state_dict of your callbacks); what was saved before is as it was"
        )


def verify_checksum(path: Path) -> bool:
    """Compare a file with its seal. A checkpoint that was written without one, as by a plain trainer, passes.

    Returns:
        Whether it has one.

    Raises:
        UserError: The file is not what was written, or cannot be read.
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
                raise UserError(f"{path} is not a checkpoint, or is damaged: it is not what was saved")
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; it is not a checkpoint") from error
    return True


def _compute_checksum(file: BinaryIO, size: int) -> str:
    """SHA-256 of the archive as it was before it got a comment."""
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
    """A file that learns the digest of what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write and take notice."""
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Pass it on."""
        self.file.flush()


class AtomicCheckpointIO(TorchCheckpointIO):
    """How a trainer writes and reads checkpoints: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    Tensors and plain data alone are read, whatever the trainer asks for: a checkpoint runs no code.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        save_checkpoint(checkpoint, Path(path))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        verify_checksum(Path(path))
        loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return loaded


class BackgroundCheckpointIO(SingleThreadCheckpointIO):
    """``AtomicCheckpointIO`` in a thread; what fails is raised by the next save or at the end.

    A save waits for the one before, so that there is one copy of the state at most, in the host's memory. A file is
    removed in its turn, when those before it are written, and only if they were.
    """

    def __init__(self) -> None:
        super().__init__(AtomicCheckpointIO())
        self._last: Future[None] | None = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if self._last is not None:
            self._last.result()
        if self.error is not None:
            raise self.error
        copied = apply_to_collection(checkpoint, torch.Tensor, lambda t: t.detach().to("cpu", copy=True))
        self._last = self.submit("save_checkpoint", copied, path)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        self._last = self.submit("remove_checkpoint", path)
