"""Sharded checkpoints: a folder to which each process writes its own shards.

A sharded checkpoint is a folder::

    last.ckpt/
        manifest.json                names, sizes and SHA-256 of the files of the checkpoint
        shards-0123456789abcdef/
            training_state.ckpt      everything but the large tensors, which are on the meta device
            shard-00001-model-00001-of-00002.safetensors      written by rank 0
            ...

The weights and the optimizer state are written and read by ``torch.distributed.checkpoint`` in the safetensors format,
so that a checkpoint contains no code and can be loaded with any number of processes. Each save writes a new subfolder.
The manifest is written last, by renaming, so a killed process leaves the previous checkpoint intact.
"""

import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from typing_extensions import NotRequired, TypedDict, override

from lit_gpt_scratch.checkpoint.checkpoint_io import load_archive, mark_saving, save_checkpoint, verify_checksum
from lit_gpt_scratch.checkpoint.training_state import SavedOptimizer
from lit_gpt_scratch.errors import UserError, exception_chain
from lit_gpt_scratch.interop.tensor_stream import LazyTensors
from lit_gpt_scratch.model.local_shard import to_local
from lit_gpt_scratch.schema import read_json, validate
from lit_gpt_scratch.text.atomic_files import (
    is_unfinished,
    name_checksum,
    remove_unfinished,
    sync_to_disk,
    write_atomically,
)
from lit_gpt_scratch.text.token_shards import sha256_file

MANIFEST: Final = "manifest.json"
TRAINING_STATE: Final = "training_state.ckpt"
SHARDS_FOLDER: Final = re.compile(r"shards-[0-9a-f]{16}")
SHARD_FILE: Final = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
FILE_BYTES: Final = 2**28
"""Approximate maximum size in bytes of a shard file; ``torch.distributed.checkpoint`` serializes a file in memory."""

REPLACED: Final = re.compile(r"replaced-([0-9a-f]{16})([0-9a-f]{16})-(.*)", re.DOTALL)
"""Pattern of the names that ``set_aside`` gives: a random token, a checksum of the token and the name, and the name."""
VISIBLE_SECONDS: Final = 60.0
"""Maximum time in seconds to wait until a network file system shows what other machines have written."""

T = TypeVar("T")
Box = tuple[tuple[int, int], ...]
log = logging.getLogger(__name__)

# Single processes save and load checkpoints on purpose, also while a process group exists.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", module="torch.distributed.checkpoint")


class FileRecord(TypedDict):
    """Size and SHA-256 of a file of a sharded checkpoint."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """Content of ``manifest.json``; ``sha256`` is the digest of the other fields."""

    version: int
    folder: str
    files: dict[str, FileRecord]
    sha256: str


class StoredTensors(TypedDict):
    """Entries of a checkpoint dict whose tensors are stored in shards."""

    state_dict: dict[str, Any]
    optimizer_states: NotRequired[list[SavedOptimizer]]


def is_sharded(path: Path) -> bool:
    """Return whether a path is a complete sharded checkpoint, i.e. a folder with a manifest."""
    return (path / MANIFEST).is_file()


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is a complete checkpoint in either format."""
    return path.is_file() or is_sharded(path)


def is_incomplete(path: Path) -> bool:
    """Return whether a folder contains only shards of killed saves, and no complete checkpoint."""
    return path.is_dir() and all(SHARDS_FOLDER.fullmatch(each.name) or is_unfinished(each) for each in path.iterdir())


def saved_at(path: Path) -> float:
    """Return the time at which a checkpoint in either format was saved, as a Unix timestamp."""
    return (path / MANIFEST if path.is_dir() else path).stat().st_mtime


def has_unfinished_shards(path: Path) -> bool:
    """Return whether a sharded checkpoint is being saved, or a killed process has left an incomplete one."""
    complete = _complete_folder(path)
    return path.is_dir() and any(
        SHARDS_FOLDER.fullmatch(each.name) and each.name != complete for each in path.iterdir()
    )


def verify_checkpoint(path: Path) -> None:
    """Verify the checksums of a checkpoint in either format.

    Raises:
        UserError: A checksum does not match, or a file is missing or cannot be read.
    """
    if path.is_dir():
        ShardedCheckpoint.open(path)
    else:
        verify_checksum(path)


@dataclass(frozen=True)
class ShardedCheckpoint:
    """Sharded checkpoint whose files have been compared with its manifest.

    Attributes:
        path: Path to the checkpoint.
        manifest: Content of its manifest.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, rank: int = 0, ranks: int = 1, with_shards: bool = True) -> "ShardedCheckpoint":
        """Open a sharded checkpoint and verify the checksums of its files.

        Args:
            path: Path to the checkpoint.
            rank: Rank of this process among those that open the checkpoint together.
            ranks: Number of such processes; each verifies the checksums of its share of the shards.
            with_shards: Whether to verify the shards; otherwise, only the training state is verified.

        Raises:
            UserError: The manifest is invalid, or a file is missing, was added, or does not match its checksum.
        """
        manifest = _read_manifest(path)
        try:
            cls._verify(path, manifest, rank, ranks, with_shards)
        except (OSError, UserError):
            if _complete_folder(path) in (None, manifest["folder"]):
                raise
            return cls.open(path, rank, ranks, with_shards)  # another process has just saved a new checkpoint
        return cls(path, manifest)

    @staticmethod
    def _verify(path: Path, manifest: Manifest, rank: int, ranks: int, with_shards: bool) -> None:
        folder = path / manifest["folder"]
        present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        if missing := sorted(manifest["files"].keys() - present):
            raise UserError(f"{path} is incomplete: {folder / missing[0]} is missing; use another checkpoint")
        if added := sorted(present - manifest["files"].keys()):
            raise UserError(
                f"{path} is corrupted: {folder / added[0]} is not in its manifest; delete this file, or use another "
                "checkpoint"
            )
        shards = sorted(manifest["files"].keys() - {TRAINING_STATE}) if with_shards else []
        for name in (TRAINING_STATE, *shards[rank::ranks]):
            _verify_file(folder / name, manifest["files"][name])

    @property
    def folder(self) -> Path:
        """Subfolder that contains the files."""
        return self.path / self.manifest["folder"]

    def read_training_state(self) -> dict[str, Any]:
        """Return the checkpoint dict; its weights and optimizer states are tensors on the meta device.

        Raises:
            UserError: The file is not a checkpoint.
        """
        state = load_archive(self.folder / TRAINING_STATE)
        try:
            validate(state, StoredTensors, "checkpoint")
            stored = {id(tensor) for _, tensor in _find_tensors(state)}
            apply_to_collection(state, Tensor, lambda tensor: _require_meta(tensor, id(tensor) in stored))
        except (ValueError, RecursionError) as error:  # a container may contain itself
            file, reason = self.folder / TRAINING_STATE, str(error).splitlines()[0]
            raise UserError(f"{file} is corrupted ({reason}); use another checkpoint") from error
        return state

    def read_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Read tensors in place.

        Args:
            tensors: Tensors keyed by name as in ``named_tensors``. Each process reads only its shard of a ``DTensor``.

        Raises:
            UserError: A tensor is missing or incomplete, or has another shape.
        """
        try:
            for name, tensor in tensors.items():
                _require_same_tensor(name, tensor, self._reader.metadata.state_dict_metadata.get(name))
            load(dict(tensors), storage_reader=self._reader, no_dist=True)
        except (Exception, CheckpointException) as error:  # reading an arbitrary file can raise anything
            _raise_if_interrupted(error)
            if is_sharded(self.path) and _read_manifest(self.path) != self.manifest:
                reason = "it was replaced while it was read; run the command again"
            else:
                detail = error if isinstance(error, ValueError) else "its tensors cannot be read"
                reason = f"{detail}; use another checkpoint"
            raise UserError(f"cannot read the checkpoint {self.path}: {reason}") from error

    @cached_property
    def _reader(self) -> "_ShardReader":
        return _ShardReader(str(self.folder))

    def load(self) -> dict[str, Any]:
        """Return the checkpoint dict with all tensors, on the CPU. Tied weights share their memory.

        Raises:
            UserError: The checkpoint is corrupted.
        """
        state = self.read_training_state()
        on_meta = dict(named_tensors(state))
        self.require_stored(on_meta)
        loaded = {id(meta): torch.empty(meta.shape, dtype=meta.dtype) for meta in on_meta.values()}
        self.read_tensors({name: loaded[id(meta)] for name, meta in on_meta.items()})
        return replace_tensors(state, lambda tensor: loaded[id(tensor)])

    def load_lazily(self) -> dict[str, Any]:
        """Return the checkpoint dict without its optimizer states; each weight is read whenever it is accessed.

        Raises:
            UserError: The checkpoint is corrupted; also raised when a weight is read.
        """
        state = self.read_training_state()
        weights: dict[str, Tensor] = state["state_dict"]
        stored = dict(named_tensors({"state_dict": weights}))
        self.require_stored(stored)
        stored_name = {id(meta): name for name, meta in stored.items()}

        def read(name: str) -> Tensor:
            meta = weights[name]
            if not meta.is_meta:  # a scalar
                return meta
            tensor = torch.empty(meta.shape, dtype=meta.dtype)
            self.read_tensors({stored_name[id(meta)]: tensor})
            return tensor

        return {**state, "state_dict": LazyTensors(weights, read), "optimizer_states": []}

    def require_stored(self, on_meta: Mapping[str, Tensor]) -> None:
        """Check that the tensors are not larger than the files, before memory is allocated for them."""
        stored = sum(file["bytes"] for file in self.manifest["files"].values())
        if sum(tensor.nbytes for tensor in on_meta.values()) > stored:
            raise UserError(f"{self.path} is corrupted: its tensors are larger than its files; use another checkpoint")


class _ShardReader(HuggingFaceStorageReader):
    """Reader that reads the headers of the files only once."""

    @cached_property
    def metadata(self) -> Metadata:
        """Shapes and shards of all tensors."""
        return super().read_metadata()

    @override
    def read_metadata(self) -> Metadata:
        return self.metadata


def named_tensors(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each tensor of a checkpoint dict that is stored in shards.

    These are the weights and the tensors of the optimizer states, except for scalars such as step counts. Of tied
    weights, only the first is yielded.
    """
    seen: set[Any] = set()
    for name, tensor in _find_tensors(checkpoint):
        identity = tensor_identity(tensor)
        if identity not in seen:
            seen.add(identity)
            yield name, tensor


def _require_meta(tensor: Tensor, is_stored: bool) -> None:
    """Check that a tensor of the training state is on the meta device if and only if it is stored in shards.

    Raises:
        ValueError: It is not.
    """
    if tensor.is_meta != is_stored:
        raise ValueError("a tensor is on the wrong device")


def _find_tensors(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    state_dict = checkpoint.get("state_dict", {})
    yield from ((f"state_dict.{name}", w) for name, w in state_dict.items() if _is_stored_in_shards(w))
    for index, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        for parameter, state in optimizer["state"].items():
            for key, value in state.items():
                if _is_stored_in_shards(value):
                    yield f"optimizer_states.{index}.{parameter}.{key}", value


def _is_stored_in_shards(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def tensor_identity(tensor: Tensor) -> Any:
    """Return a key that is equal for tensors with the same memory, data type, shape and strides, such as tied weights.

    It is unique for each tensor on the meta device and each ``DTensor`` of which this process holds no part.
    """
    local = to_local(tensor)
    if tensor.is_meta or not local.numel():
        return id(tensor)
    return local.data_ptr(), local.dtype, local.shape, local.stride()


def replace_tensors(checkpoint: Mapping[str, Any], replace: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return a copy of a checkpoint dict in which the tensors of ``named_tensors`` are replaced.

    Args:
        checkpoint: Checkpoint dict.
        replace: Function that returns the replacement of a tensor; it is called for each occurrence of a tied weight.
    """

    def replaced(values: Mapping[Any, Any]) -> dict[Any, Any]:
        return {key: replace(v) if _is_stored_in_shards(v) else v for key, v in values.items()}

    result = dict(checkpoint)
    if "state_dict" in checkpoint:
        result["state_dict"] = replaced(checkpoint["state_dict"])
    if "optimizer_states" in checkpoint:
        result["optimizer_states"] = [
            {**optimizer, "state": {parameter: replaced(state) for parameter, state in optimizer["state"].items()}}
            for optimizer in checkpoint["optimizer_states"]
        ]
    return result


def save_sharded(checkpoint: Mapping[str, Any], path: Path, group: ProcessGroup | None = None) -> None:
    """Write a sharded checkpoint atomically: if a process is killed or the disk is full, the previous one is kept.

    Args:
        checkpoint: Checkpoint dict, whose weights and optimizer states may be ``DTensor``s.
        path: Path to the folder, which all ranks can access.
        group: Gloo process group whose ranks all call this function; None if a single process saves.

    Raises:
        UserError: A rank cannot write its files; raised on all ranks.
    """
    rank = 0 if group is None else dist.get_rank(group)
    action = f"save {path}"
    with mark_saving(path, alone=group is None):
        # Rank 0 chooses the names: a rank that holds no part of a tied weight does not see that it is tied.
        folder, names = _agree(group, action, lambda: _create_folder(path, checkpoint) if rank == 0 else (path, []))[0]
        try:
            _agree(group, action, lambda: _require_folder(folder))
            chosen = set(names)
            tensors = {name: tensor for name, tensor in _find_tensors(checkpoint) if name in chosen}
            _agree(group, action, lambda: _write_shards(tensors, folder, group))
            records = _agree(group, action, lambda: _record_shards(folder, rank))
            shards = {name: file for part in records for name, file in part.items()}
            _agree(group, action, lambda: _commit(checkpoint, path, folder, shards) if rank == 0 else None)
        except BaseException:  # including Ctrl-C: an incomplete save would waste disk space
            if rank == 0 and _complete_folder(path) != folder.name:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def open_on_all_ranks(path: Path, group: ProcessGroup | None) -> ShardedCheckpoint:
    """Open a sharded checkpoint on all ranks of a group, each of which verifies a share of the files.

    Raises:
        UserError: The checkpoint is corrupted; raised on all ranks.
    """
    if group is None:
        return ShardedCheckpoint.open(path)
    opened: list[ShardedCheckpoint] = []
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    _agree(group, f"open {path}", lambda: opened.append(ShardedCheckpoint.open(path, rank, ranks)))
    return opened[0]


def _agree(group: ProcessGroup | None, action: str, function: Callable[[], T]) -> list[T]:
    """Call a function on all ranks and return all results; if it fails on any rank, raise an error on all of them.

    Args:
        group: Group of the ranks that call this function; None if a single process does.
        action: Verb and object for error messages, such as "save last.ckpt".
        function: The function to call.

    Raises:
        UserError: The function failed on a rank.
    """
    result: Any = None
    failure: str | None = None
    try:
        result = function()
    except UserError as error:
        failure = str(error)
    except (Exception, CheckpointException) as error:  # an error on one rank must not leave the others waiting
        if group is None:
            _raise_if_interrupted(error)
        failure = f"cannot {action}: {_describe_failure(error)}"
        if group is None and not isinstance(error, OSError | CheckpointException):
            raise
        log.debug("%s", failure, exc_info=True)
    outcomes: list[Any] = [(result, failure)]
    if group is not None:
        outcomes *= dist.get_world_size(group)
        dist.all_gather_object(outcomes, (result, failure), group=group)
    if failures := [reason for _, reason in outcomes if reason is not None]:
        raise UserError(failures[0])
    return [value for value, _ in outcomes]


def _raise_if_interrupted(error: BaseException) -> None:
    """Raise the ``KeyboardInterrupt`` or ``SystemExit`` that a ``CheckpointException`` contains, if any."""
    for cause, _ in getattr(error, "failures", {}).values():
        if not isinstance(cause, Exception | CheckpointException):
            raise cause


def _describe_failure(error: BaseException) -> str:
    """Return the reason of an error in one line: that of the operating system, if it is the cause."""
    failures = getattr(error, "failures", {})  # of torch.distributed.checkpoint, by rank
    causes = [each for first in (error, *(cause for cause, _ in failures.values())) for each in exception_chain(first)]
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return f"{type(causes[-1]).__name__}: {causes[-1]}".splitlines()[0]


def _create_folder(path: Path, checkpoint: Mapping[str, Any]) -> tuple[Path, list[str]]:
    """Create the subfolder of a new checkpoint, and return its path and the names of the tensors to store in shards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    set_aside(path, sharded=True)
    path.mkdir(exist_ok=True)
    # Subfolders that killed processes have left.
    _remove_shards(path, keep=_complete_folder(path))
    folder = path / f"shards-{secrets.token_hex(8)}"
    folder.mkdir()
    return folder, [name for name, _ in named_tensors(checkpoint)]


def _write_shards(tensors: dict[str, Tensor], folder: Path, group: ProcessGroup | None) -> None:
    """Write the shards of this rank; a shard that several ranks hold is written by one of them."""
    files: dict[str, int] = {}
    size, ranks = 0, 1 if group is None else dist.get_world_size(group)
    for name, tensor in tensors.items():
        size += tensor.nbytes
        files[name] = 1 + size // (FILE_BYTES * ranks)
    if files:
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
        writer.per_thread_copy_ahead = 0  # copy one tensor after another, without a stream of the current CUDA device
        save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def _record_shards(folder: Path, rank: int) -> dict[str, FileRecord]:
    """Return the sizes and checksums of the files that this rank has written."""
    return {path.name: _record_file(path) for path in folder.glob(f"shard-{rank + 1:05d}-*.safetensors")}


def _record_file(path: Path) -> FileRecord:
    sync_to_disk(path)
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_file(path))


def _commit(checkpoint: Mapping[str, Any], path: Path, folder: Path, shards: dict[str, FileRecord]) -> None:
    """Write the training state and then the manifest, and delete the previous checkpoint."""
    meta: dict[Any, Tensor] = {}

    def to_meta(tensor: Tensor) -> Tensor:
        return meta.setdefault(tensor_identity(tensor), torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    save_checkpoint(replace_tensors(checkpoint, to_meta), folder / TRAINING_STATE)
    sync_to_disk(folder)
    _require_visible(folder, shards)
    files = {TRAINING_STATE: _record_file(folder / TRAINING_STATE), **shards}
    content: dict[str, Any] = {"version": 1, "folder": folder.name, "files": files}
    write_atomically(path / MANIFEST, json.dumps({**content, "sha256": _digest(content)}, indent=1))
    sync_to_disk(path.parent)
    _remove_shards(path, keep=folder.name)
    remove_replaced(path)


def _require_folder(folder: Path) -> None:
    """Check that this process sees the folder that rank 0 has created; otherwise, torch would create another one.

    Raises:
        UserError: The folder does not exist on this machine.
    """
    if not _wait_until(folder.is_dir):
        raise UserError(
            f"cannot save {folder.parent}: another machine does not see this folder; set --runs to a folder that all "
            "machines share"
        )


def _require_visible(folder: Path, shards: Mapping[str, FileRecord]) -> None:
    """Check that this process sees the files of all ranks; a network file system may show them with a delay.

    Raises:
        UserError: A file is missing or incomplete.
    """
    for name, record in shards.items():
        if not _wait_until(partial(_has_size, folder / name, record["bytes"])):
            raise UserError(
                f"cannot save {folder.parent}: rank 0 does not see {name}, which another rank has written; "
                "set --runs to a folder that all machines share"
            )


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _wait_until(condition: Callable[[], bool]) -> bool:
    """Wait up to ``VISIBLE_SECONDS`` until a condition holds, and return whether it does."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def set_aside(path: Path, sharded: bool) -> None:
    """Rename the checkpoint at a path if it is in another format than the one that will replace it.

    Args:
        path: Path to a checkpoint, which may be missing.
        sharded: Whether a sharded checkpoint will be written.
    """
    is_folder = path.is_dir() and not path.is_symlink()  # a link is replaced like a file
    if is_folder and not sharded and is_incomplete(path):
        remove_checkpoint(path)
    elif is_folder and not any(SHARDS_FOLDER.fullmatch(each.name) for each in path.iterdir()):
        if not sharded or any(path.iterdir()):
            raise UserError(f"cannot save {path}: it is a folder with other files; choose another path")
    elif is_folder != sharded and os.path.lexists(path):
        token = secrets.token_hex(8)
        path.rename(path.with_name(f"replaced-{token}{name_checksum(path.name, token)}-{path.name}"))


def remove_replaced(path: Path) -> None:
    """Delete the checkpoints that ``set_aside`` has renamed, once another one has replaced them."""
    for other in path.parent.glob("replaced-*"):
        match = REPLACED.fullmatch(other.name)
        if match and match[3] == path.name and name_checksum(match[3], match[1]) == match[2]:
            remove_checkpoint(other)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint in either format, if it exists.

    If its folder also contains other files, only the files of the checkpoint are deleted.

    Raises:
        OSError: The manifest or the file cannot be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        if any(SHARDS_FOLDER.fullmatch(each.name) for each in path.iterdir()):
            (path / MANIFEST).unlink(missing_ok=True)
        _remove_shards(path, keep=None)
        remove_unfinished(path)
        with suppress(OSError):
            path.rmdir()
        if path.exists():
            log.warning("%s is not empty after its checkpoint was deleted, so the folder is kept", path)
    else:
        path.unlink(missing_ok=True)


def _remove_shards(path: Path, keep: str | None) -> None:
    """Delete all subfolders with shards except one; other files and folders are not touched."""
    for folder in path.iterdir():
        if SHARDS_FOLDER.fullmatch(folder.name) and folder.name != keep and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


def _complete_folder(path: Path) -> str | None:
    """Return the name of the subfolder that the manifest refers to, or None without a valid manifest."""
    try:
        return _read_manifest(path)["folder"]
    except UserError:
        return None


def _read_manifest(path: Path) -> Manifest:
    """Read and validate a manifest.

    Raises:
        UserError: It is missing or invalid, or its checksum does not match.
    """
    try:
        manifest = read_json(path / MANIFEST, Manifest)
        content = {key: manifest[key] for key in ("version", "folder", "files")}
        if manifest["sha256"] != _digest(content) or manifest.keys() != Manifest.__annotations__.keys():
            raise ValueError("its checksum does not match")
        if manifest["version"] != 1:
            raise ValueError("it was written by a newer version of lit_gpt_scratch")
        names = [name for name in manifest["files"] if name != TRAINING_STATE and not SHARD_FILE.fullmatch(name)]
        if not SHARDS_FOLDER.fullmatch(manifest["folder"]) or names or TRAINING_STATE not in manifest["files"]:
            raise ValueError("it names other files than those of a checkpoint")
    except FileNotFoundError as error:
        raise UserError(f"{path} is incomplete: {path / MANIFEST} is missing; use another checkpoint") from error
    except OSError as error:
        raise UserError(f"cannot read {path / MANIFEST}: {error.strerror}; check its permissions") from error
    except ValueError as error:
        raise UserError(f"{path / MANIFEST} is corrupted ({error}); use another checkpoint") from error
    return manifest


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _verify_file(path: Path, record: FileRecord) -> None:
    """Compare a file's size and checksum with its record.

    Raises:
        UserError: They differ, or the file cannot be read.
    """
    try:
        info = path.lstat()
        is_plain = stat.S_ISREG(info.st_mode) and info.st_size == record["bytes"]
        intact = is_plain and sha256_file(path) == record["sha256"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    if not intact:
        raise UserError(f"{path} is corrupted: its checksum does not match; use another checkpoint")


def _require_same_tensor(name: str, tensor: Tensor, saved: Any) -> None:
    """Check that a stored tensor is complete and has the expected shape; its data type is not checked.

    Raises:
        ValueError: The tensor is missing or incomplete, or has another shape.
    """
    if not isinstance(saved, TensorStorageMetadata):
        raise ValueError(f"it has no tensor {name}")
    if saved.size != tensor.shape:
        raise ValueError(f"{name} has the shape {tuple(saved.size)} instead of {tuple(tensor.shape)}")
    boxes = [tuple(zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in saved.chunks if chunk.sizes.numel()]
    if sum(math.prod(size for _, size in box) for box in boxes) != tensor.numel() or _any_overlap(boxes):
        raise ValueError(f"a part of {name} is missing or repeated")


def _any_overlap(boxes: list[Box]) -> bool:
    """Return whether any two boxes, each given by the offset and size in each dimension, overlap."""
    boxes = sorted(boxes)  # by their offset in the first dimension, so that few pairs have to be compared
    for index, box in enumerate(boxes):
        for other in boxes[index + 1 :]:
            if other[0][0] >= box[0][0] + box[0][1]:
                break
            if all(a < c + d and c < a + b for (a, b), (c, d) in zip(box, other, strict=True)):
                return True
    return False
