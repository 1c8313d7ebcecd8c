"""Tensors of a folder, and whether they are those of a model."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.model_family import ModelShape
from lit_gpt_scratch.model import GPT

WEIGHTS_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
PICKLE_FILES: Final = ("pytorch_model.bin", "pytorch_model.bin.index.json")
DERIVED_BUFFERS: Final = re.compile(r"(\.attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
"""Masks and frequencies that older files hold; they follow from the config."""
MAX_LISTED: Final = 4


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor in a folder, in the type that it has there.

    Raises:
        UserError: A file is missing or damaged, or the weights are in a form that can run code when it is read.
    """
    if (folder / WEIGHTS_FILE).is_file():
        found = _read_file(folder / WEIGHTS_FILE)
    elif (folder / INDEX_FILE).is_file():
        found = _read_shards(folder)
    elif pickles := [name for name in PICKLE_FILES if (folder / name).exists()]:
        raise UserError(
            f"{folder} holds {pickles[0]}, which can run code when it is read, and no {WEIGHTS_FILE}; "
            "save it again with safe_serialization in transformers"
        )
    else:
        raise UserError(f"no {WEIGHTS_FILE} and no {INDEX_FILE} in {folder}; FOLDER is one that save_pretrained wrote")
    found = {name: tensor for name, tensor in found.items() if not DERIVED_BUFFERS.search(name)}
    if odd := [f"{name} is {tensor.dtype}" for name, tensor in found.items() if not _is_plain_float(tensor)]:
        raise UserError(f"{folder} holds weights that are not plain numbers: {_list_some(odd)}; save it unquantised")
    return found


def _read_shards(folder: Path) -> dict[str, Tensor]:
    path = folder / INDEX_FILE
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        if any(Path(name).name != name for name in files):  # an index may not point out of its folder
            raise ValueError("it names other folders")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no index of weights ({error})") from error
    found: dict[str, Tensor] = {}
    for name in files:
        found |= _read_file(folder / name)
    if lost := sorted(set(places) - set(found)):
        raise UserError(f"{path} names tensors that are in no file: {_list_some(lost)}; download the folder again")
    return found


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            # Copies: a tensor could stay a window into the file, which may change or go.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; download the folder again") from error
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no safetensors file, or is damaged; download it again") from error


def expected_tensors(shape: ModelShape) -> dict[str, Tensor]:
    """What the network's state dict is, without numbers and without memory."""
    with torch.device("meta"):
        return GPT(*shape).state_dict()


def validate_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Compare names and shapes.

    Raises:
        UserError: They differ; it says in what.
    """
    wrong = [
        f"{name} is {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    said = [
        f"{what}: {_list_some(names)}"
        for what, names in (
            ("missing", [name for name in wanted if name not in found]),
            ("unknown", [name for name in found if name not in wanted]),
            ("of another shape", wrong),
        )
        if names
    ]
    if said:
        raise UserError(f"the tensors in {where} are not those that its config describes; {'; '.join(said)}")


def _is_plain_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1  # 8 bits come with scales, which would be lost


def _list_some(names: list[str]) -> str:
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
