"""Folders that cannot be imported: one line that names the problem, before anything is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_checkpoint import read_hf_checkpoint
from tests.interop.conftest import LONGROPE, YARN, Published, change


def error_message(folder: Path) -> str:
    with pytest.raises(UserError) as rejected:
        read_hf_checkpoint(folder)
    assert "\n" not in str(rejected.value)
    return str(rejected.value)


@pytest.mark.parametrize(
    ("case", "fields", "messages"),
    [
        ("llama", {"hidden_act": "gelu_new"}, ["hidden_act is gelu_new"]),
        ("llama", {"hidden_act": "relu", "mlp_bias": True}, ["hidden_act is relu", "attention_bias is False"]),
        ("llama", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping is 50.0"]),
        ("llama", {"final_logit_softcapping": 30.0}, ["final_logit_softcapping is 30.0"]),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config is", "gptq"]),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, ["auto_map is"]),
        ("llama", {"attention_dropout": 0.1}, ["attention_dropout is 0.1"]),
        ("llama", {"sliding_window": 9}, ["sliding_window is 9"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        ("llama", {"num_local_experts": 8}, ["num_local_experts is 8"]),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types is full_attention and sli"]),
        ("llama", {"layer_types": 3}, ["layer_types is 3"]),
        ("qwen3", {"use_sliding_window": True}, ["use_sliding_window is True"]),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, ["layer_types is sliding_attention"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias is True"]),
        ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, ["layer_types is sliding_attention and"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx is True"]),
        ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights is False"]),
        ("gpt2", {"activation_function": "gelu"}, ["activation_function is gelu (only gelu_new"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention is True"]),
        ("gpt2", {"attn_pdrop": 0.0}, ["resid_pdrop is 0.1, embd_pdrop is 0.1, attn_pdrop is 0.0"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "proportional", "factor": 2.0}},
            ["rope_type is proportional (must be one of default"],
        ),
        ("llama", {"rope_scaling": {"type": "axial"}}, ["rope_scaling.type is axial"]),
        ("llama", {"rope_scaling": {"type": "su"}}, ["rope_scaling.short_factor is missing; it must be a list of po"]),
        ("llama", {"rope_parameters": LONGROPE | {"long_factor": [1, 0]}}, ["long_factor is [1, 0]; it must be a lis"]),
        ("llama", {"rope_parameters": LONGROPE | {"short_factor": [1.0]}}, ["rotary_short_factors has 1 numbers"]),
        ("llama", {"rope_parameters": LONGROPE | {"attention_factor": 1.5}}, ["attention_factor is 1.5", "1.10"]),
        ("llama", {"rope_parameters": {"mrope_section": [1, 2]}}, ["rope_parameters.mrope_section is"]),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}, ["rope_parameters.attention_factor is 1.5"]),
        ("llama", {"rope_parameters": YARN | {"truncate": 2}}, ["rope_parameters.truncate is 2; it must be true or"]),
        (
            "llama",
            {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
            ["rope_parameters.mscale is 1.0", "mscale_all_dim is 1.0"],
        ),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 1.0}}, ["beta_fast is 1.0 (must be greater than beta_slow"]),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters.factor is missing"]),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2}}, ["low_freq_factor is missing"]),
        ("llama", {"rope_scaling": "linear"}, ["rope_scaling is linear; it must be null or an object"]),
        ("llama", {"hidden_size": ...}, ["hidden_size is missing; it must be a positive integer"]),
        ("llama", {"hidden_size": "32"}, ["hidden_size is 32; it must be"]),
        ("llama", {"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
        ("llama", {"vocab_size": True}, ["vocab_size is True"]),
        ("llama", {"rms_norm_eps": "small"}, ["rms_norm_eps is small; it must be a number"]),
        ("llama", {"tie_word_embeddings": 1}, ["tie_word_embeddings is 1; it must be true or false"]),
        ("llama", {"num_key_value_heads": 3}, ["config.json describes a model that is not supported", "n_kv_head (3)"]),
        ("llama", {"vocab_size": 250}, ["vocab_size is 250", "ids up to 299"]),
        (
            "smollm3",
            {"no_rope_layers": [1, 0, 0, 1, 1]},
            ["no_rope_layers", "only 0 in every layer whose number is divisible by 2"],
        ),
        (
            "smollm3",
            {"no_rope_layers": "all"},
            ["no_rope_layers is all (must be a list with an element for each of the 5 layers)"],
        ),
        ("smollm3", {"mlp_bias": True, "attention_bias": True}, ["mlp_bias is True", "attention_bias is True"]),
        ("olmo2", {"attention_bias": True}, ["attention_bias is True (only False)"]),
        (
            "phi3",
            {"attention_bias": True, "resid_pdrop": 0.1},
            ["attention_bias is True", "resid_pdrop is 0.1 (only 0)"],
        ),
        ("phi3", {"head_dim": 16}, ["head_dim is 16 (must be hidden_size / num_attention_heads, 8)"]),
        ("phi3", {"partial_rotary_factor": 0.3, "rope_parameters": {}}, ["must be a fraction of the 8 channels"]),
        ("phi3", {"rope_parameters": YARN}, ["rope_type must be default or longrope"]),
        ("qwen2", {"is_causal": False}, ["is_causal is False (only True)"]),
        ("qwen2", {"use_sliding_window": True}, ["use_sliding_window is True"]),
        (
            "llama",
            {"model_type": "gemma"},
            ["model_type is gemma; it must be one of gemma2, gemma3_text, gpt2, gpt_oss, llama, mistral, mixtral"],
        ),
        (
            "llama",
            {
                "model_type": "gemma3",
                "text_config": {"model_type": "gemma3_text"},
                "vision_config": {"model_type": "siglip_vision_model"},
            },
            ["a multimodal model, whose language model is described by text_config", "an image encoder"],
        ),
        ("gemma3", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping is 50.0 (only null)"]),
        ("gemma3", {"use_bidirectional_attention": True}, ["use_bidirectional_attention is True (only False)"]),
        ("gemma2", {"attention_bias": True}, ["attention_bias is True (only False)"]),
        ("gemma2", {"hidden_activation": "silu"}, ["hidden_activation is silu (only gelu_pytorch_tanh or gelu_new)"]),
        ("gemma2", {"query_pre_attn_scalar": 2.5}, ["query_pre_attn_scalar is 2.5; it must be a positive integer"]),
        (
            "gemma2",
            {"layer_types": ["full_attention", *["sliding_attention"] * 4]},
            ["layer_types is", "must be full_attention in every n-th layer, and sliding_attention in the others"],
        ),
        ("gemma2", {"layer_types": ["full_attention"]}, ["must be a list with an element for each of the 5 layers"]),
        ("gemma2", {"sliding_window": None}, ["sliding_window is None; it must be a positive integer"]),
        ("gemma2", {"final_logit_softcapping": -1.0}, ["model.gpt.logit_softcap is -1.0; it must be positive"]),
        ("gemma3", {"rope_parameters": {"rope_theta": 9.0}}, ["rope_parameters.rope_theta is 9.0 (only null)"]),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}},
            ["rope_parameters.sliding_attention is", "rope_type must be default"],
        ),
        (
            "gpt_oss",
            {"attention_bias": False, "swiglu_limit": 6.0, "swiglu_alpha": 1.0, "hidden_act": "gelu"},
            [
                "attention_bias is False (only True)",
                "swiglu_limit is 6.0 (only 7.0)",
                "swiglu_alpha is 1.0 (only 1.702",
                "hidden_act is gelu (only silu or swish)",
            ],
        ),
        ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}, ["quant_method is gptq (only mxfp4)"]),
        ("gpt_oss", {"sliding_window": None}, ["sliding_window is None; it must be a positive integer"]),
        ("gpt_oss", {"num_local_experts": 1}, ["experts_per_token is 2, but model.gpt.n_experts is 1"]),
        ("gpt_oss", {"num_experts_per_tok": 1}, ["experts_per_token is 1", "the router is not trained"]),
        (
            "gpt_oss",
            {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
            ["must be full_attention in every n-th layer, and sliding_attention in the others"],
        ),
        ("llama", {"model_type": ...}, ["has no model_type; it must be one of gemma2"]),
    ],
)
def test_unsupported_config(published: Published, case: str, fields: dict[str, Any], messages: list[str]) -> None:
    _, folder = published(case)
    change(folder, **fields)
    message = error_message(folder)
    assert str(folder / "config.json") in message
    for part in messages:
        assert part in message


@pytest.mark.parametrize(
    "rope",
    [
        YARN | {"attention_factor": 1.1098612288668110, "truncate": True, "finetuned": True},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.0},
        {"rope_type": "default", "rope_theta": 500.0, "factor": None},
    ],
)
def test_redundant_fields_are_accepted(published: Published, rope: dict[str, Any]) -> None:
    _, folder = published("llama")
    change(folder, rope_parameters=rope)
    assert read_hf_checkpoint(folder).shape.gpt.rotary_scaling == (None if rope["rope_type"] == "default" else "yarn")


def edit(folder: Path, change_: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change_(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("case", "change_", "problem"),
    [
        ("llama", lambda w: w.pop("model.norm.weight"), "missing: model.norm.weight"),
        ("llama", lambda w: w.pop("lm_head.weight"), "missing: lm_head.weight"),
        ("llama", lambda w: w.update(extra=torch.ones(2)), "unexpected: extra"),
        (
            "gpt2",
            lambda w: w.update({"transformer.ln_f.bias": torch.ones(3)}),
            "wrong shape: transformer.ln_f.bias is (3,), not (32,)",
        ),
        ("gpt2", lambda w: w.update({"lm_head.weight": torch.ones(320, 32)}), "tie_word_embeddings is true or absent"),
        ("gpt2", lambda w: w.update({"lm_head.weight": torch.ones(320, 32).half()}), "tie_word_embeddings is true or"),
        ("gpt2", lambda w: w.update({"transformer.ln_f.bias": torch.ones(32, dtype=torch.int8)}), "torch.int8"),
        ("llama", lambda w: [w.pop(name) for name in list(w)[:6]], "and 2 more"),
    ],
)
def test_mismatched_tensors(
    published: Published, case: str, change_: Callable[[dict[str, torch.Tensor]], object], problem: str
) -> None:
    _, folder = published(case)
    edit(folder, change_)
    message = error_message(folder)
    assert problem in message
    assert str(folder) in message


def test_missing_or_damaged_files(published: Published, tmp_path: Path) -> None:
    assert "no folder at" in error_message(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert f"no config.json in {tmp_path / 'empty'}" in error_message(tmp_path / "empty")
    _, folder = published("llama")
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(b"{}")
    assert "is not a usable tokenizer file" in error_message(folder)
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer.json in" in error_message(folder)
    (folder / "tokenizer.json").write_bytes(whole)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100])
    assert "model.safetensors is not a safetensors file, or is corrupted" in error_message(folder)
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors and no model.safetensors.index.json in" in error_message(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "contains pytorch_model.bin, which can run code" in error_message(folder)
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "config.json is not a valid config" in error_message(folder)
    (folder / "config.json").write_text("[]", encoding="utf-8")
    assert "config.json is not a valid config" in error_message(folder)


def test_missing_shards_and_paths_outside_the_folder(published: Published) -> None:
    _, folder = published("llama", max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    known = json.loads(index.read_text(encoding="utf-8"))
    for content, problem in (
        ("{}", "is not a valid index file"),
        ('{"weight_map": []}', "is not a valid index file"),
        (json.dumps({"weight_map": {"x": "../secret.safetensors"}}), "it refers to files in other folders"),
        (
            json.dumps({"weight_map": known["weight_map"] | {"y": known["weight_map"]["lm_head.weight"]}}),
            "missing from all files: y",
        ),
    ):
        index.write_text(content, encoding="utf-8")
        assert problem in error_message(folder)
    index.write_text(json.dumps(known), encoding="utf-8")
    next(folder.glob("model-*.safetensors")).unlink()
    assert "is missing; download the folder again" in error_message(folder)
