"""Models of unsupported types, saved by ``transformers``: the error names what differs from a supported family."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_checkpoint import read_hf_checkpoint
from tests.interop.conftest import Published, change, library
from tests.mutations import mutate_json

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "intermediate_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip


def saved(model_type: str, folder: Path) -> Path:
    """A tiny model of a type, whose config has the type's own fields."""
    transformers = library()
    config = transformers.AutoConfig.for_model(model_type)
    config = type(config)(**{name: size for name, size in SIZES.items() if hasattr(config, name)})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def error_message(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        read_hf_checkpoint(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "closest", "differences"),
    [
        ("falcon", "", ["attention and feed-forward network in parallel", "multi_query = True", "mlp.dense_4h_to_h"]),
        ("gpt_neox", "", ["attention and feed-forward network in parallel", "hidden_act is gelu (only silu or swish)"]),
        ("mamba", "", ["state-space layers", "additional tensors backbone.embeddings, backbone.layers.*.mixer"]),
        ("granite", "llama", ["embedding_multiplier = 1.0"]),
        ("olmo", "llama", ["missing tensors model.layers.*.input_layernorm, model.layers.*.post_attention_layernorm"]),
        ("starcoder2", "qwen2", ["additional tensors model.layers.*.input_layernorm.bias", "use_bias = True"]),
        ("nemotron", "llama", ["hidden_act is relu2", "partial_rotary_factor is 0.5", "missing tensors", "gate_proj"]),
    ],
)
def test_differences_are_named(tmp_path: Path, model_type: str, closest: str, differences: list[str]) -> None:
    message = error_message(saved(model_type, tmp_path))
    assert f"config.json: model_type is {model_type}; it must be one of gemma2, " in message
    assert f"it differs from {closest}" in message
    for difference in differences:
        assert difference in message
    for irrelevant in ("token_id", "initializer_range", "transformers_version", "lm_head", "use_cache"):
        assert irrelevant not in message


@pytest.mark.parametrize(("case", "family"), [("llama", "llama"), ("gpt2", "gpt2"), ("qwen3", "qwen3")])
def test_no_differences_are_invented(published: Published, case: str, family: str) -> None:
    """A supported model under another type has none, and one changed field is the only one that is named."""
    _, folder = published(case)
    change(folder, model_type="mine")
    assert "differs" not in error_message(folder)
    change(folder, soft_layers=3)
    assert error_message(folder).endswith(f"; it differs from {family}, at least in: unknown fields soft_layers = 3")


def test_without_weights_only_the_configs_are_compared(published: Published) -> None:
    _, folder = published("llama")
    (folder / "model.safetensors").unlink()
    change(folder, model_type="mine", parallel_attn=True)
    message = error_message(folder)
    assert "in: attention and feed-forward network in parallel; unknown fields parallel_attn = True" in message
    assert "tensors" not in message


def test_any_config_of_another_type_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = saved("falcon", tmp_path)
    whole: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for seed in range(50):
        mutated = mutate_json(whole, random.Random(seed))
        (folder / "config.json").write_text(json.dumps(mutated), encoding="utf-8")
        error_message(folder)
