"""Read the safetensors files in a Hugging Face folder, and check tensor names and shapes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_config import shorten
from lit_gpt_scratch.interop.mxfp4 import dequantize_stored
from lit_gpt_scratch.interop.tensor_stream import LazyTensors, open_safetensors, select
from lit_gpt_scratch.schema import read_json, validate

WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
PICKLE_FILES: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json")
DERIVED_BUFFERS: Final = re.compile(r"(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
"""Pattern for masks and rotary frequencies in older files, which are ignored because the config determines them."""
MAX_LISTED: Final = 4


def open_tensors(folder: Path) -> LazyTensors:
    """Open all tensors in a folder, which keep their dtypes and are read when they are accessed.

    Weights in MXFP4 are dequantized to bfloat16.

    Raises:
        UserError: A file is missing or corrupted (also raised when a tensor is read), or the weights are in a format
            that can run code when loaded.
    """
    if (folder / WEIGHTS_FILE).is_file():
        found = _open_file(folder / WEIGHTS_FILE)
    elif (folder / INDEX_FILE).is_file():
        found = _open_shards(folder)
    elif pickles := [name for name in PICKLE_FILES if (folder / name).exists()]:
        raise UserError(
            f"{folder} contains {pickles[0]}, which can run code when loaded, but no {WEIGHTS_FILE}; "
            "save the model again with safe_serialization=True in transformers"
        )
    else:
        raise UserError(f"no {WEIGHTS_FILE} and no {INDEX_FILE} in {folder}; use a folder written by save_pretrained")
    found = select(found, {name: name for name in found if not DERIVED_BUFFERS.search(name)})
    found = dequantize_stored(found)
    shapes = found.on_meta
    if quantized := [f"{name} is {tensor.dtype}" for name, tensor in shapes.items() if not _is_plain_float(tensor)]:
        raise UserError(f"{folder} contains quantized weights: {list_some(quantized)}; use the unquantized model")
    return found


def _open_shards(folder: Path) -> LazyTensors:
    path = folder / INDEX_FILE
    try:
        content = read_json(path, dict[str, Any])
        file_of = validate(content.get("weight_map"), dict[str, str], "weight_map")
        files = sorted(set(file_of.values()))
        if any(Path(name).name != name for name in files):  # reject paths outside the folder
            raise ValueError("it refers to files in other folders")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a valid index file of a sharded checkpoint ({error}); download it again"
        ) from error
    file_with: dict[str, LazyTensors] = {}
    for name in files:
        opened = _open_file(folder / name)
        file_with |= dict.fromkeys(opened, opened)
    found = LazyTensors(
        {name: opened.on_meta[name] for name, opened in file_with.items()}, lambda name: file_with[name][name]
    )
    if missing := sorted(set(file_of) - set(found)):
        raise UserError(
            f"{path} lists tensors that are missing from all files: {list_some(missing)}; download the folder again"
        )
    return found


def _open_file(path: Path) -> LazyTensors:
    name = path.parent / shorten(path.name)
    opened, _ = open_safetensors(
        path,
        f"{name} is missing; download the folder again",
        f"{name} is not a safetensors file, or is corrupted; download it again",
    )
    return opened


def validate_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Check that tensors have the expected names and shapes, and floating-point dtypes where expected.

    Args:
        found: Tensors keyed by name.
        expected: Tensors with the expected names and shapes.
        where: Description of the source of the tensors, used in error messages.

    Raises:
        UserError: Names, shapes or dtypes differ; the message lists all differences.
    """
    wrong_shape = [
        f"{name} is {tuple(found[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    not_float = [
        name for name in expected if name in found and expected[name].is_floating_point() > _is_plain_float(found[name])
    ]
    differences = [
        f"{problem}: {list_some(names)}"
        for problem, names in (
            ("missing", [name for name in expected if name not in found]),
            ("unexpected", [name for name in found if name not in expected]),
            ("wrong shape", wrong_shape),
            ("not floating-point", not_float),
        )
        if names
    ]
    if differences:
        raise UserError(
            f"the tensors in {where} do not match its config ({'; '.join(differences)}); "
            "download or export the model again"
        )


def _is_plain_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1  # 8-bit weights have scales in other tensors


def list_some(names: list[str]) -> str:
    """Join the first ``MAX_LISTED`` names, and count the others."""
    more = len(names) - MAX_LISTED
    return ", ".join(map(shorten, names[:MAX_LISTED])) + (f" and {more} more" if more > 0 else "")
