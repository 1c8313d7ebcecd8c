"""Convert checkpoints between one file and shards, without holding the whole checkpoint in memory."""

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from lightning_utilities.core.apply_func import apply_to_collections
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import set_default_mmap_options, skip_data

from lit_gpt_scratch.checkpoint.checkpoint_io import append_checksum, explain_save_errors
from lit_gpt_scratch.checkpoint.loading import load_checkpoint, validate_checkpoint
from lit_gpt_scratch.checkpoint.sharded_checkpoint import (
    ShardedCheckpoint,
    is_sharded,
    named_tensors,
    replace_tensors,
    save_sharded,
)
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.atomic_files import atomic_file

MAPPED_BYTES: Final = 2**28
"""Approximate maximum size in bytes of the tensors that are mapped into memory at once."""


def to_sharded(path: Path, sharded: Path) -> None:
    """Convert a checkpoint in one file to a sharded checkpoint, in files of about 256 MB or one tensor.

    Args:
        path: Path to the checkpoint.
        sharded: Path to the folder to create.

    Raises:
        UserError: The checkpoint cannot be read, is sharded already, or the output exists or cannot be written.
    """
    if is_sharded(path):
        raise UserError(f"{path} is sharded already; it can be loaded with any strategy and number of processes")
    _require_new(sharded)
    save_sharded(load_checkpoint(path, mapped=True), sharded)


def to_one_file(sharded: Path, path: Path) -> None:
    """Convert a sharded checkpoint to one file.

    Args:
        sharded: Path to the sharded checkpoint.
        path: Path to the file to write.

    Raises:
        UserError: The checkpoint cannot be read, is not sharded, or the output exists or cannot be written.
    """
    if not is_sharded(sharded):
        raise UserError(
            f"{sharded} is not a sharded checkpoint; pass a folder written with --checkpoint.format sharded"
        )
    _require_new(path)
    checkpoint = ShardedCheckpoint.open(sharded)
    state = checkpoint.read_training_state()
    validate_checkpoint(state, sharded, ("cpu", "meta"))
    stored = dict(named_tensors(state))
    checkpoint.require_stored(stored)
    with explain_save_errors(path), atomic_file(path) as file:
        with FakeTensorMode():
            without_data = {id(meta): torch.empty(meta.shape, dtype=meta.dtype) for meta in stored.values()}
        with skip_data(materialize_fake_tensors=True):  # leaves a gap for each tensor in the file
            torch.save(replace_tensors(state, lambda meta: without_data[id(meta)]), file)
        file.flush()
        if hasattr(os, "posix_fallocate"):  # writing to a mapped file ends the process if the disk is full
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        for names in _in_batches(stored):
            with set_default_mmap_options(mmap.MAP_SHARED):  # writing to a tensor writes to the file
                mapped = torch.load(file.name, mmap=True, weights_only=True)
            targets = dict(named_tensors(mapped))
            checkpoint.read_tensors({name: targets[name] for name in names})
        with set_default_mmap_options(mmap.MAP_SHARED):
            mapped = torch.load(file.name, mmap=True, weights_only=True)
        apply_to_collections(state, mapped, Tensor, _copy_small)
        append_checksum(file)


def _copy_small(value: Tensor, target: Tensor) -> None:
    """Copy a tensor that is stored in the training state, such as a step count."""
    if not value.is_meta:
        target.copy_(value)


def _in_batches(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names of tensors in groups that fit into ``MAPPED_BYTES``, if possible."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > MAPPED_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _require_new(path: Path) -> None:
    """Check that no file or folder exists at a path.

    Raises:
        UserError: It exists.
    """
    if path.exists():
        raise UserError(f"{path} already exists; pass another path, or delete it")
