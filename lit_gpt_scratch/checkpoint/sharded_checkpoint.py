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
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from typing_extensions import NotRequired, TypedDict

from lit_gpt_scratch.checkpoint.checkpoint_io import load_archive, save_checkpoint, verify_checksum
from lit_gpt_scratch.checkpoint.training_state import SavedOptimizer
from lit_gpt_scratch.errors import UserError, exception_chain
from lit_gpt_scratch.interop.tensor_stream import LazyTensors
from lit_gpt_scratch.model.local_shard import to_local
from lit_gpt_scratch.schema import read_json, validate
from lit_gpt_scratch.text.atomic_files import write_atomically
from lit_gpt_scratch.text.token_shards import sha256_file

MANIFEST: Final = "manifest.json"
TRAINING_STATE: Final = "training_state.ckpt"
SHARDS_FOLDER: Final = re.compile(r"shards-[0-9a-f]{16}")
SHARD_FILE: Final = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
FILE_BYTES: Final = 2**28
"""Approximate maximum size in bytes of a shard file; ``torch.distributed.checkpoint`` serializes a file in memory."""

T = TypeVar("T")

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


def saved_at(path: Path) -> float:
    """Return the time at which a checkpoint in either format was saved, as a Unix timestamp."""
    return (path / MANIFEST if path.is_dir() else path).stat().st_mtime


def has_unfinished_shards(path: Path) -> bool:
    """Return whether a sharded checkpoint is being saved, or a killed process has left an incomplete one."""
    complete = _read_manifest(path)["folder"] if is_sharded(path) else None
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
    def open(cls, path: Path, rank: int = 0, ranks: int = 1) -> "ShardedCheckpoint":
        """Open a sharded checkpoint and verify the checksums of its files.

        Args:
            path: Path to the checkpoint.
            rank: Rank of this process among those that open the checkpoint together.
            ranks: Number of such processes; each verifies the checksums of its share of the files.

        Raises:
            UserError: The manifest is invalid, or a file is missing, was added, or does not match its checksum.
        """
        manifest = _read_manifest(path)
        folder = path / manifest["folder"]
        present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        if missing := sorted(manifest["files"].keys() - present):
            raise UserError(f"{path} is incomplete: {folder / missing[0]} is missing; use another checkpoint")
        if added := sorted(present - manifest["files"].keys()):
            raise UserError(
                f"{path} is corrupted: {folder / added[0]} is not in its manifest; delete this file, or use another "
                "checkpoint"
            )
        for name in sorted(manifest["files"])[rank::ranks]:
            _verify_file(folder / name, manifest["files"][name])
        return cls(path, manifest)

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
        except ValueError as error:
            raise UserError(f"{self.folder / TRAINING_STATE} is corrupted ({error}); use another checkpoint") from error
        return state

    def read_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Read tensors in place.

        Args:
            tensors: Tensors keyed by name as in ``named_tensors``. Each process reads only its shard of a ``DTensor``.

        Raises:
            UserError: A tensor is missing, incomplete, or has another shape or data type.
        """
        reader = HuggingFaceStorageReader(str(self.folder))
        try:
            saved = reader.read_metadata().state_dict_metadata
            for name, tensor in tensors.items():
                _require_same_tensor(name, tensor, saved.get(name))
            load(dict(tensors), storage_reader=reader, no_dist=True)
        except ValueError as error:
            raise UserError(f"{self.path} is corrupted: {error}; use another checkpoint") from error
        except (Exception, CheckpointException) as error:  # reading an arbitrary file can raise anything
            raise UserError(f"{self.path} is corrupted: its tensors cannot be read; use another checkpoint") from error

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
        stored_name = {id(meta): name for name, meta in named_tensors({"state_dict": weights})}
        self.require_stored(dict(named_tensors({"state_dict": weights})))

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
    """Return a key that is equal for tensors that share their memory, such as tied weights.

    All empty tensors have the same key, including the ``DTensor``s of which this process holds no part.
    """
    local = to_local(tensor)
    return id(tensor) if tensor.is_meta else (local.data_ptr(), local.shape)


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
    # Of tied weights, rank 0 chooses the one that is stored: a rank that holds no part of them does not see the tie.
    folder, names = _agree(group, action, lambda: _create_folder(path, checkpoint) if rank == 0 else (path, []))[0]
    try:
        tensors = {name: tensor for name, tensor in _find_tensors(checkpoint) if name in names}
        _agree(group, action, lambda: _write_shards(tensors, folder, group))
        records = _agree(group, action, lambda: _record_shards(folder, rank))
        shards = {name: file for part in records for name, file in part.items()}
        _agree(group, action, lambda: _commit(checkpoint, path, folder, shards) if rank == 0 else None)
    except BaseException:
        if rank == 0 and (not is_sharded(path) or _read_manifest(path)["folder"] != folder.name):
            shutil.rmtree(folder, ignore_errors=True)  # frees disk space
        raise


def open_on_all_ranks(path: Path, group: ProcessGroup | None) -> ShardedCheckpoint:
    """Open a sharded checkpoint on all ranks of a group, each of which verifies a share of the files.

    Raises:
        UserError: The checkpoint is corrupted; raised on all ranks.
    """
    if group is None:
        return ShardedCheckpoint.open(path)
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    return _agree(group, f"open {path}", lambda: ShardedCheckpoint.open(path, rank, ranks))[rank]


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
        failure = f"cannot {action}: {_describe_failure(error)}"
        if group is None and not isinstance(error, OSError | CheckpointException):
            raise
    outcomes: list[Any] = [(result, failure)]
    if group is not None:
        outcomes *= dist.get_world_size(group)
        dist.all_gather_object(outcomes, (result, failure), group=group)
    if failures := [reason for _, reason in outcomes if reason is not None]:
        raise UserError(failures[0])
    return [value for value, _ in outcomes]


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
    _remove_shards(path, keep=_read_manifest(path)["folder"] if is_sharded(path) else None)
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
        save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def _record_shards(folder: Path, rank: int) -> dict[str, FileRecord]:
    """Return the sizes and checksums of the files that this rank has written."""
    return {path.name: _record_file(path) for path in folder.glob(f"shard-{rank + 1:05d}-*.safetensors")}


def _record_file(path: Path) -> FileRecord:
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_file(path))


def _commit(checkpoint: Mapping[str, Any], path: Path, folder: Path, shards: dict[str, FileRecord]) -> None:
    """Write the training state and then the manifest, and delete the previous checkpoint."""
    meta: dict[Any, Tensor] = {}

    def to_meta(tensor: Tensor) -> Tensor:
        return meta.setdefault(tensor_identity(tensor), torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    save_checkpoint(replace_tensors(checkpoint, to_meta), folder / TRAINING_STATE)
    files = {TRAINING_STATE: _record_file(folder / TRAINING_STATE), **shards}
    content: dict[str, Any] = {"version": 1, "folder": folder.name, "files": files}
    write_atomically(path / MANIFEST, json.dumps({**content, "sha256": _digest(content)}, indent=1))
    _remove_shards(path, keep=folder.name)
    remove_checkpoint(previous_format(path))


def previous_format(path: Path) -> Path:
    """Return the path to which a checkpoint is renamed until a checkpoint in another format has replaced it."""
    return path.with_name(f"previous-{path.name}")


def set_aside(path: Path, sharded: bool) -> None:
    """Rename the checkpoint at a path if it is in another format than the one that will replace it.

    Args:
        path: Path to a checkpoint, which may be missing.
        sharded: Whether a sharded checkpoint will be written.
    """
    if path.is_dir() and not sharded and not is_sharded(path):
        remove_checkpoint(path)  # left by a process that was killed while it saved its first checkpoint
    elif path.is_file() if sharded else path.is_dir():
        remove_checkpoint(previous_format(path))
        path.rename(previous_format(path))


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint in either format, if it exists; files of other programs in its folder are kept.

    Raises:
        OSError: The folder contains other files, or a file cannot be deleted.
    """
    if path.is_dir():
        (path / MANIFEST).unlink(missing_ok=True)
        _remove_shards(path, keep=None)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def _remove_shards(path: Path, keep: str | None) -> None:
    """Delete all subfolders with shards except one; other files and folders are not touched."""
    for folder in path.iterdir():
        if SHARDS_FOLDER.fullmatch(folder.name) and folder.name != keep and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


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
        intact = path.stat().st_size == record["bytes"] and sha256_file(path) == record["sha256"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    if not intact:
        raise UserError(f"{path} is corrupted: its checksum does not match; use another checkpoint")


def _require_same_tensor(name: str, tensor: Tensor, saved: Any) -> None:
    """Check that a stored tensor is complete and has the expected shape and data type.

    Raises:
        ValueError: It does not.
    """
    if not isinstance(saved, TensorStorageMetadata):
        raise ValueError(f"it has no tensor {name}")
    if saved.size != tensor.shape:
        raise ValueError(f"{name} has the shape {tuple(saved.size)} instead of {tuple(tensor.shape)}")
    if sum(chunk.sizes.numel() for chunk in saved.chunks) != tensor.numel():
        raise ValueError(f"a part of {name} is missing")
