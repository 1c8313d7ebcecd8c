"""Hugging Face folders with wrong types and sizes: one error before memory is allocated, whatever the files say."""

import json
import random
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_checkpoint import PortableModel, read_hf_checkpoint, write_hf_checkpoint
from lit_gpt_scratch.interop.hf_weights import INDEX_FILE, WEIGHTS_FILE
from lit_gpt_scratch.interop.model_family import ModelShape
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import TINY
from tests.interop.conftest import VOCABULARY, change
from tests.mutations import DEPTH, fuzz, mutate_bytes, mutate_json, nested_json, refuse_in_one_line


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that this package wrote, so that the tests need no ``transformers``."""
    shape = ModelShape(
        replace(TINY, rotary_scaling="yarn", rotary_factor=2.0, rotary_trained_context=16), VOCABULARY, 32
    )
    path = tmp_path_factory.mktemp("hf") / "model"
    write_hf_checkpoint(PortableModel(shape, GPT(*shape).state_dict(), tokenizer), path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture
def sharded(copy: Path) -> Path:
    """The folder with its weights in two files and an index."""
    from safetensors.torch import load_file

    weights = load_file(copy / WEIGHTS_FILE)
    (copy / WEIGHTS_FILE).unlink()
    names = sorted(weights)
    files = {name: f"model-{1 + (i % 2)}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, copy / file)
    index = {"metadata": {"total_size": 9}, "weight_map": files}
    (copy / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9, "layer_types": None}, {"num_hidden_layers": 9_999, "layer_types": None},
        {"hidden_size": 2**31 - 1}, {"hidden_size": 2**30}, {"vocab_size": 2**31 - 1}, {"intermediate_size": 2**31 - 1},
        {"max_position_embeddings": 2**31 - 1}, {"num_attention_heads": 2**30}, {"head_dim": 2**30},
        {"num_key_value_heads": 2**31 - 1}, {"rope_theta": 10**400}, {"rms_norm_eps": 10**400},
        {"model_type": "gpt2", "n_layer": 10**9, "n_head": 1, "n_embd": 32, "n_positions": 2**31 - 1},
        {"layer_types": ["full_attention"] * 9_999 + ["x" * 10_000]},
        {"model_type": "smollm3", "num_hidden_layers": 10**9, "layer_types": None, "no_rope_layers": [1]},
    ],
    ids=" ".join,
)  # fmt: skip
def test_sizes_are_compared_with_the_tensors(copy: Path, fields: dict[str, Any]) -> None:
    change(copy, **fields)
    refuse_in_one_line(lambda: read_hf_checkpoint(copy), 1000)


@pytest.mark.parametrize("name", ["config.json", INDEX_FILE, "tokenizer.json"])
@pytest.mark.parametrize("text", [nested_json(), '{"a":' * DEPTH, "null", "[]", "3", '"x"', "", "\0"])
def test_deep_json_and_other_types(sharded: Path, name: str, text: str) -> None:
    (sharded / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=name):
        read_hf_checkpoint(sharded)


@pytest.mark.parametrize(
    "weight_map", [None, 3, ["x"], {"x": None}, {"x": ["model-1.safetensors"]}, {"x": ""}, {"x": ".."}, {"x": "a\0b"}]
)
def test_weight_map_of_another_type(sharded: Path, weight_map: Any) -> None:
    (sharded / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(UserError):
        read_hf_checkpoint(sharded)


def fuzz_folder(folder: Path, name: str, seeds: range) -> None:
    """Mutate a JSON file, the header of a safetensors file, or the bytes of either."""
    whole = (folder / name).read_bytes()

    def attempt(seed: int, rng: random.Random) -> None:
        content = mutate_bytes(whole, rng)
        if seed % 4 and name.endswith(".json"):
            content = json.dumps(mutate_json(json.loads(whole), rng)).encode()
        elif seed % 4:
            (size,) = struct.unpack("<Q", whole[:8])
            header = json.dumps(mutate_json(json.loads(whole[8 : 8 + size]), rng)).encode()
            content = struct.pack("<Q", len(header)) + header + whole[8 + size :]
        (folder / name).write_bytes(content)
        model = read_hf_checkpoint(folder)
        GPT(*model.shape).load_state_dict(model.weights)

    fuzz(name, folder, seeds, attempt)
    (folder / name).write_bytes(whole)


def test_damaged_folders(sharded: Path, folder: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    fuzz_folder(sharded, INDEX_FILE, range(50))
    fuzz_folder(whole, "config.json", range(50))
    fuzz_folder(whole, WEIGHTS_FILE, range(50))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [INDEX_FILE, "config.json", WEIGHTS_FILE])
def test_many_damaged_folders(sharded: Path, folder: Path, tmp_path: Path, name: str) -> None:
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    fuzz_folder(sharded if name == INDEX_FILE else whole, name, range(50, 550))


def test_float_weights_are_required(copy: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(copy / WEIGHTS_FILE)
    for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn):
        save_file(weights | {"model.norm.weight": torch.ones(32).to(dtype)}, copy / WEIGHTS_FILE)
        with pytest.raises(UserError, match=r"model\.norm\.weight"):
            read_hf_checkpoint(copy)
