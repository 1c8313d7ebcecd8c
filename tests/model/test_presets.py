"""Presets against the published parameter counts, and against ``transformers``."""

from typing import Any

import pytest
import torch
from torch import nn

from lit_gpt_scratch.interop import hf_checkpoint
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.module_metadata import inactive_parameters
from lit_gpt_scratch.model.positions import rotary_frequencies, unscaled_frequencies
from lit_gpt_scratch.model.presets import PRESETS

VOCABULARY = {
    "gpt2": 50_257, "llama3": 128_256, "qwen3": 151_936, "qwen2.5": 151_936, "olmo2": 100_352, "smollm3": 128_256,
    "mixtral": 32_000, "phi3": 32_064, "gemma2": 256_000, "gemma3": 262_144,
    "gpt": 201_088,
}  # fmt: skip
FAMILIES = {
    "gpt2": "GPT2", "llama3": "Llama", "qwen3": "Qwen3", "qwen2.5": "Qwen2", "olmo2": "Olmo2", "smollm3": "SmolLM3",
    "mixtral": "Mixtral", "phi3": "Phi3", "gemma2": "Gemma2", "gemma3": "Gemma3",
    "gpt": "GptOss",
}  # fmt: skip
PUBLISHED = {
    "gpt2_124m": 124_439_808, "gpt2_350m": 354_823_168, "gpt2_774m": 774_030_080, "gpt2_1558m": 1_557_611_200,
    "llama3_1b": 1_235_814_400, "llama3_8b": 8_030_261_248, "llama3_70b": 70_553_706_496,
    "qwen3_0.6b": 596_049_920, "qwen3_1.7b": 1_720_574_976, "qwen3_8b": 8_190_735_360,
    "qwen2.5_0.5b": 494_032_768, "olmo2_1b": 1_484_916_736, "smollm3_3b": 3_075_098_624,
    "qwen3_moe_30b": 30_532_122_624, "mixtral_8x7b": 46_702_792_704, "phi3_mini": 3_821_079_552,
    "gemma2_2b": 2_614_341_888, "gemma3_1b": 999_885_952, "gpt_oss_20b": 20_914_757_184,
}  # fmt: skip

# From the published config.json files.
LLAMA = {"rms_norm_eps": 1e-5, "vocab_size": 128_256, "max_position_embeddings": 131_072, "num_key_value_heads": 8}
QWEN = {"rms_norm_eps": 1e-6, "vocab_size": 151_936, "max_position_embeddings": 40_960, "num_key_value_heads": 8}
ROTARY = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA = {
    "num_hidden_layers": 26, "head_dim": 256, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
THEIRS: dict[str, dict[str, Any]] = {
    "gpt2_124m": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2_350m": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2_774m": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2_1558m": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "llama3_1b": LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "head_dim": 64, "tie_word_embeddings": True,
        "rope_parameters": ROTARY | {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0},
    },
    "llama3_8b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "tie_word_embeddings": False,
        "rope_parameters": ROTARY | {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0},
    },
    "llama3_70b": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "tie_word_embeddings": False,
        "rope_parameters": ROTARY | {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0},
    },
    "qwen3_0.6b": QWEN | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "head_dim": 128, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    },
    "qwen3_1.7b": QWEN | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "head_dim": 128, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    },
    "qwen3_8b": QWEN | {
        "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "head_dim": 128, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    },
    "qwen3_moe_30b": QWEN | {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": False, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    },
    "mixtral_8x7b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "vocab_size": 32_000, "max_position_embeddings": 32_768,
        "tie_word_embeddings": False, "num_local_experts": 8, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
    },
    "qwen2.5_0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 151_936, "max_position_embeddings": 32_768,
        "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "olmo2_1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "vocab_size": 100_352, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "smollm3_3b": {
        "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 128_256, "max_position_embeddings": 65_536,
        "no_rope_layer_interval": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0},
    },
    "phi3_mini": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "vocab_size": 32_064, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "sliding_window": 2047, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "gpt_oss_20b": {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "vocab_size": 201_088,
        "max_position_embeddings": 131_072, "sliding_window": 128, "tie_word_embeddings": False,
        "num_local_experts": 32, "num_experts_per_tok": 4, "swiglu_limit": 7.0, "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150_000, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": False,
        },
    },
    "gemma2_2b": GEMMA | {
        "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 256_000, "max_position_embeddings": 8192, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 10_000.0,
    },
    "gemma3_1b": GEMMA | {
        "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4, "num_key_value_heads": 1,
        "vocab_size": 262_144, "max_position_embeddings": 32_768, "sliding_window": 512, "sliding_window_pattern": 6,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
}  # fmt: skip


def on_meta(config: GPTConfig, vocab_size: int) -> GPT:
    with torch.device("meta"):  # shapes without memory
        return GPT(config, vocab_size, block_size=1024)


def size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_every_published_preset_is_tested() -> None:
    assert PRESETS.keys() == PUBLISHED.keys() | {"nano", "micro", "mini"}
    assert THEIRS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_parameter_count(name: str) -> None:
    assert size(on_meta(PRESETS[name], VOCABULARY[name.split("_")[0]])) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "active"), [("qwen3_moe_30b", 3.35e9), ("mixtral_8x7b", 12.88e9), ("gpt_oss_20b", 4.19e9)]
)
def test_active_parameters(name: str, active: float) -> None:
    """Published as "3.3B" and "12.9B"; for gpt-oss, as "3.61B" without the embedding, which has 0.58B."""
    net = on_meta(PRESETS[name], VOCABULARY[name.split("_")[0]])
    assert size(net) - inactive_parameters(net) == pytest.approx(active, rel=2e-3)


@pytest.mark.parametrize("name", THEIRS)
def test_preset_matches_the_published_config_in_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    family = "Qwen3Moe" if name == "qwen3_moe_30b" else FAMILIES[name.split("_")[0]]
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(**THEIRS[name])
    with torch.device("meta"):
        theirs = getattr(transformers, head)(config)
    ours = PRESETS[name]
    net = on_meta(ours, config.vocab_size)
    assert size(net) == size(theirs) == PUBLISHED[name]
    assert (net.head.weight is net.embedding.weight) == config.tie_word_embeddings
    if family == "GPT2":  # has queries, keys and values in one matrix
        block, other = net.blocks[-1], theirs.transformer.h[-1]
        assert sorted(tuple(p.shape) for p in block.feed_forward.parameters()) == sorted(
            tuple(p.shape[::-1]) if p.ndim == 2 else tuple(p.shape) for p in other.mlp.parameters()
        )
        assert (ours.n_head, ours.norm_eps) == (config.n_head, config.layer_norm_epsilon)
        assert (ours.feed_forward, config.activation_function) == ("gelu", "gelu_new")
        assert type(block.attention_norm) is type(other.ln_1) is nn.LayerNorm
        return
    if family in ("Mixtral", "Qwen3Moe"):  # whose files have other tensors than the model of transformers
        shapes = [
            sorted(tuple(p.shape) for p in block.parameters()) for block in (net.blocks[-1], theirs.model.layers[-1])
        ]
        experts, width, hidden = ours.n_experts, ours.n_embd, ours.ffn_width
        shapes[1] = sorted([*shapes[1], *2 * [(experts, hidden, width)]])  # it has gate and input in one tensor
        shapes[1].remove((experts, 2 * hidden, width))
        assert shapes[0] == shapes[1]
    else:
        translated = dict(hf_checkpoint.FAMILIES[config.model_type].to_hf_weights(ours, net.state_dict()))
        known = {name: parameter.shape for name, parameter in theirs.named_parameters()}
        assert {name: tensor.shape for name, tensor in translated.items()} == known
    assert (ours.n_head, ours.kv_heads, ours.head_width) == (
        config.num_attention_heads, config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )  # fmt: skip
    rotates = [bool(getattr(layer.self_attn, "use_rope", True)) for layer in theirs.model.layers]
    skip_every = ours.rotary_skip_every or ours.n_layer + 1
    assert rotates == [(layer + 1) % skip_every != 0 for layer in range(ours.n_layer)]
    if family in ("Phi3", "GptOss"):
        assert ours.sliding_window == config.sliding_window
    assert ours.norm_eps == config.rms_norm_eps
    if family == "GptOss":
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        assert [ours.is_local(layer) for layer in range(ours.n_layer)] == kinds
        assert (ours.n_experts, ours.experts_per_token) == (config.num_local_experts, config.num_experts_per_tok)
    if "gemma" in name:
        assert (ours.feed_forward, config.hidden_activation) == ("geglu", "gelu_pytorch_tanh")
        assert (ours.norm, ours.norm_placement) == ("zero_centered_rmsnorm", "sandwich")
        assert (ours.head_width, ours.attention_scale) == (config.query_pre_attn_scalar, None)
        assert ours.attention_softcap == config.attn_logit_softcapping
        assert ours.logit_softcap == config.final_logit_softcapping
        assert ours.sliding_window == config.sliding_window
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        assert [ours.is_local(layer) for layer in range(ours.n_layer)] == kinds
    else:
        assert (ours.feed_forward in ("swiglu", "moe"), config.hidden_act) == (True, "silu")
    assert ours.qk_norm == hasattr(theirs.model.layers[0].self_attn, "q_norm")
    rotary = type(theirs.model.rotary_emb)(config)  # not on the meta device: its values are compared
    kind = "full_attention_" if family == "Gemma3" else ""
    expected, factor = getattr(rotary, f"{kind}inv_freq"), getattr(rotary, f"{kind}attention_scaling")
    if ours.rotary_local_base is not None:
        found = unscaled_frequencies(ours.rotary_local_base, ours.rotary_width)
        torch.testing.assert_close(found, rotary.sliding_attention_inv_freq, rtol=1e-5, atol=0)
    found, ours_factor = rotary_frequencies(ours, ours.rotary_width)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert ours_factor == factor
    assert (factor == 1) == (family != "GptOss")


@pytest.mark.parametrize(("name", "millions"), [("nano", 0.8), ("micro", 3.9), ("mini", 17.7)])
def test_parameter_counts_of_laptop_sizes(name: str, millions: float) -> None:
    net = on_meta(PRESETS[name], 8192)
    assert size(net.blocks) / 1e6 == pytest.approx(millions, abs=0.05)
    assert size(net) == size(net.blocks) + 2 * 8192 * PRESETS[name].n_embd + size(net.norm)


@pytest.mark.parametrize("name", ["nano", "micro", "mini"])
def test_laptop_sizes_have_the_default_architecture(name: str) -> None:
    shape = {key: getattr(PRESETS[name], key) for key in ("n_layer", "n_head", "n_embd")}
    assert PRESETS[name] == GPTConfig(**shape)
