"""Weights in MXFP4 have the values of ``transformers``, and packed models those of the unpacked ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_checkpoint import read_hf_checkpoint, write_hf_checkpoint
from lit_gpt_scratch.interop.mxfp4 import dequantize_mxfp4
from tests.interop.conftest import Published, change, ids, library, network


def packed(*shape: int, least: int = 120, most: int = 130) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and scales of matrices of shape (..., in_features)."""
    *rows, width = shape
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(256, (*rows, width // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(least, most, (*rows, width // 32), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("least", "most"), [(0, 3), (120, 130), (250, 255), (0, 255)])
def test_values_are_those_of_transformers(least: int, most: int) -> None:
    """Over the whole range of scales: the smallest are below the normal numbers, and the largest exceed all numbers."""
    library()
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = packed(3, 24, 96, least=least, most=most)
    found = dequantize_mxfp4(blocks, scales)
    assert (found.shape, found.dtype) == ((3, 96, 24), torch.bfloat16)
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


def test_values_by_hand() -> None:
    """The two codes of a byte, lower bits first: 0x1 is 0.5 and 0xF is -6; a scale of 129 is 4."""
    blocks = torch.full((1, 1, 1, 16), 0xF1, dtype=torch.uint8)
    found = dequantize_mxfp4(blocks, torch.full((1, 1, 1), 129, dtype=torch.uint8))
    assert found.flatten().tolist() == [2.0, -24.0] * 16


@pytest.fixture
def quantized(published: Published) -> tuple[Path, Path]:
    """A model with packed experts in the layout of the published files, and the same model in bfloat16."""
    folders = []
    for name in ("packed", "plain"):
        _, folder = published("gpt_oss", torch.bfloat16, name)
        weights = load_file(folder / "model.safetensors")
        for weight in [name for name in weights if name.endswith("_proj") and "experts" in name]:
            experts, in_features, out_features = weights[weight].shape
            blocks, scales = packed(experts, out_features, in_features)
            if name == "plain":
                weights[weight] = dequantize_mxfp4(blocks, scales).contiguous()
            else:
                del weights[weight]
                weights |= {f"{weight}_blocks": blocks, f"{weight}_scales": scales}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        folders.append(folder)
    change(folders[0], quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folders[0], folders[1]


def test_packed_model_equals_the_unpacked_one(quantized: tuple[Path, Path], tmp_path: Path) -> None:
    found, expected = (read_hf_checkpoint(folder) for folder in quantized)
    assert found.shape == expected.shape
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in expected.weights.items():
        assert torch.equal(found.weights[name], tensor), name
    write_hf_checkpoint(found, tmp_path / "hf")
    reference = library().AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours = network(found._replace(weights={name: tensor.float() for name, tensor in found.weights.items()}))
    scale = reference(ids()).logits.abs().max()
    assert (ours(ids()) - reference(ids()).logits).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize(
    ("name", "change_"),
    [
        ("scales", lambda tensor: tensor[..., :-1].contiguous()),
        ("blocks", lambda tensor: tensor[..., :8].contiguous()),
        ("blocks", lambda tensor: tensor.flatten(0, 1)),
        ("blocks", lambda tensor: tensor.to(torch.int8)),
        ("scales", lambda _: None),
    ],
)
def test_other_packed_tensors_are_refused(quantized: tuple[Path, Path], name: str, change_: Any) -> None:
    path = quantized[0] / "model.safetensors"
    weights = load_file(path)
    weight = f"model.layers.1.mlp.experts.down_proj_{name}"
    changed = change_(weights.pop(weight))
    save_file(weights if changed is None else weights | {weight: changed}, path)
    with pytest.raises(UserError, match=r"contains quantized weights: .*use the unquantized model") as error:
        read_hf_checkpoint(quantized[0])
    assert "\n" not in str(error.value)
