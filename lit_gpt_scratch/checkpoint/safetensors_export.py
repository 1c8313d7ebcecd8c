"""Export a model as a single ``.safetensors`` file, which is safe to share because it cannot contain code."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.tensor_stream import (
    add_prefix,
    on_meta,
    open_safetensors,
    strip_prefix,
    to_bytes,
    write_safetensors,
)
from lit_gpt_scratch.schema import parse_json
from lit_gpt_scratch.text.atomic_files import atomic_file

SAFETENSORS_SUFFIX: Final = ".safetensors"


def export_safetensors(checkpoint: dict[str, Any], prefix: str, path: Path) -> None:
    """Write the weights, config and tokenizer of a checkpoint to a ``.safetensors`` file.

    Optimizer state and loop counters are omitted, and the tensors are read one at a time. The header of the file
    contains the checkpoint metadata as JSON, and the SHA-256 digest of the metadata and weights.

    Args:
        checkpoint: Checkpoint dict returned by ``loading.load_checkpoint`` or ``loading.load_lazily``.
        prefix: Prefix of the network's weights in the checkpoint's state dict.
        path: Path to the file to write.

    Raises:
        UserError: The file cannot be written.
    """
    weights = strip_prefix(checkpoint["state_dict"], prefix)  # tied weights are stored twice
    metadata = json.dumps(checkpoint[METADATA_KEY], sort_keys=True)
    header = {METADATA_KEY: metadata, "sha256": compute_digest(metadata, weights)}
    try:
        with atomic_file(path) as file:
            write_safetensors(file, on_meta(weights), weights.items(), header)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; check the permissions and the free disk space"
        ) from error


def load_safetensors(path: Path, prefix: str) -> dict[str, Any]:
    """Load a file written by ``export_safetensors`` as a checkpoint dict without optimizer state or loop counters.

    The weights are read once to verify the checksum, and then again when they are accessed.

    Args:
        path: Path to the file.
        prefix: Prefix to add to the names of the weights.

    Raises:
        UserError: The file is missing or corrupted, or was not written by ``export_safetensors``.
    """
    foreign = f"{path} was not exported by lit_gpt_scratch, or is corrupted; export the model again"
    weights, header = open_safetensors(path, f"no checkpoint at {path}; check the path", foreign)
    metadata = header.get(METADATA_KEY)
    if metadata is None:
        raise UserError(foreign)
    if header.get("sha256") != compute_digest(metadata, weights):
        raise UserError(f"{path} is corrupted: its checksum does not match; export the model again")
    try:
        content = parse_json(metadata, dict[str, Any], len(metadata))
    except ValueError as error:
        raise UserError(f"the metadata of {path} is corrupted ({error}); export the model again") from error
    return {METADATA_KEY: content, "state_dict": add_prefix(weights, prefix)}


def compute_digest(metadata: str, weights: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 digest of a string and of tensors, including their names, dtypes and shapes."""
    sha256 = hashlib.sha256(metadata.encode())
    for name in sorted(weights):
        weight = weights[name]
        sha256.update(f"\0{name} {weight.dtype} {tuple(weight.shape)}\0".encode())
        sha256.update(to_bytes(weight))
    return sha256.hexdigest()
