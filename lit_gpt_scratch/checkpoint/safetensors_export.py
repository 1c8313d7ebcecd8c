"""A model as one ``.safetensors`` file: weights to give away, with nothing in it that could run."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_gpt_scratch.checkpoint.checkpoint_io import PARTIAL_SUFFIX
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY
from lit_gpt_scratch.errors import UserError

SAFETENSORS_SUFFIX: Final = ".safetensors"


def export_safetensors(checkpoint: dict[str, Any], prefix: str, path: Path) -> None:
    """Write the network of a checkpoint, its shape and its tokenizer; optimizer and counters stay behind.

    The metadata hold the contents as JSON and a SHA-256 of contents and weights.

    Args:
        checkpoint: As ``loading.load_checkpoint`` gives it.
        prefix: Of the network's names in the checkpoint's state.
        path: The file to write.

    Raises:
        UserError: It cannot be written.
    """
    state = {name: weight for name, weight in checkpoint["state_dict"].items() if name.startswith(prefix)}
    weights = {name.removeprefix(prefix): w.clone() for name, w in state.items()}  # tied ones are written twice
    contents = json.dumps(checkpoint[METADATA_KEY], sort_keys=True)
    unfinished = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        unfinished.write_bytes(save(weights, {METADATA_KEY: contents, "sha256": compute_digest(contents, weights)}))
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def load_safetensors(path: Path, prefix: str) -> dict[str, Any]:
    """What ``export_safetensors`` wrote, in the form of a checkpoint without optimizer and counters.

    Raises:
        UserError: The file is missing, is something else, or is not what was written.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        contents = metadata[METADATA_KEY]
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}") from error
    except (SafetensorError, OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a model of lit_gpt_scratch, or is damaged") from error
    if metadata.get("sha256") != compute_digest(contents, weights):
        raise UserError(f"{path} is damaged: it is not what was written")
    return {
        METADATA_KEY: json.loads(contents),
        "state_dict": {prefix + name: weight for name, weight in weights.items()},
    }


def compute_digest(contents: str, weights: dict[str, Tensor]) -> str:
    """SHA-256 of a text and of tensors, their names and types."""
    sha256 = hashlib.sha256(contents.encode())
    for name, weight in sorted(weights.items()):
        sha256.update(f"\0{name} {weight.dtype} {tuple(weight.shape)}\0".encode())
        sha256.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()
