"""Tiny Hugging Face models with random weights, saved by ``transformers``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.interop.hf_checkpoint import PortableModel
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import sentences

VOCABULARY = 320
"""More ids than the tokenizer has."""
LENGTH = 48
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 72, "max_position_embeddings": LENGTH, "rms_norm_eps": 3e-5,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH, "bos_token_id": 0,
    "eos_token_id": 0, "layer_norm_epsilon": 3e-5,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 3.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 40,
    "low_freq_factor": 1.0, "high_freq_factor": 3.0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 24,
    "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.5, 4.0, 9.0],
}  # fmt: skip
NO_PADDING = {"pad_token_id": None}  # otherwise, the embedding of that token has no gradient
GEMMA = LLAMA | NO_PADDING | {
    "num_hidden_layers": 5, "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 20,
}  # fmt: skip
GPT_OSS = LLAMA | NO_PADDING | {
    "num_hidden_layers": 3, "head_dim": 16, "intermediate_size": 64, "sliding_window": 5, "num_local_experts": 5,
    "num_experts_per_tok": 2, "rope_parameters": YARN | {"truncate": False},
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, untied": (
        "GPT2",
        GPT2 | {"tie_word_embeddings": False, "n_inner": 80, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama": ("Llama", LLAMA | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama, biases, tied": (
        "Llama",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "llama, linear": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}},
    ),
    "llama, llama3": ("Llama", LLAMA | {"rope_parameters": LLAMA3}),
    "llama, yarn": ("Llama", LLAMA | {"rope_parameters": YARN}),
    "llama, yarn, turns": (
        "Llama",
        LLAMA | {"rope_parameters": YARN | {"beta_fast": 2.0, "beta_slow": 0.25, "truncate": True}},
    ),
    "llama, dynamic": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama, longrope": ("Llama", LLAMA | {"rope_parameters": LONGROPE}),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
    "qwen3, tied": ("Qwen3", LLAMA | {"head_dim": 10, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2, tied": ("Qwen2", LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "olmo2": ("Olmo2", LLAMA | NO_PADDING),
    "olmo2, tied": ("Olmo2", LLAMA | NO_PADDING | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "smollm3": ("SmolLM3", LLAMA | NO_PADDING | {"num_hidden_layers": 5, "no_rope_layer_interval": 2}),
    "smollm3, untied": ("SmolLM3", LLAMA | NO_PADDING | {"num_hidden_layers": 4, "tie_word_embeddings": False}),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, window": ("Mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 5}),
    "qwen3_moe": (
        "Qwen3Moe",
        LLAMA | {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 16},
    ),
    "qwen3_moe, normalized, tied": (
        "Qwen3Moe",
        LLAMA
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        | {"tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
    "phi3": ("Phi3", LLAMA | NO_PADDING),
    "phi3, longrope, window": (
        "Phi3",
        LLAMA | NO_PADDING | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24, "sliding_window": 5},
    ),
    "phi4": (
        "Phi3",
        LLAMA
        | NO_PADDING
        | {
            "hidden_size": 64,
            "rope_parameters": LONGROPE
            | {
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 9.0],
            },
            "original_max_position_embeddings": 24,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", LLAMA | {"sliding_window": 5}),
    "gpt_oss": ("GptOss", GPT_OSS),
    "gpt_oss, no scaling, local": (
        "GptOss",
        GPT_OSS
        | {
            "num_hidden_layers": 1,
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "gpt_oss, global, tied": (
        "GptOss",
        GPT_OSS | {"layer_types": ["full_attention"] * 3, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "llama, yarn, not truncated": ("Llama", LLAMA | {"rope_parameters": YARN | {"truncate": False}}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 6.0}),
    "gemma2, untied, no caps": (
        "Gemma2",
        GEMMA
        | {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "query_pre_attn_scalar": 12,
            "num_hidden_layers": 2,
        },
    ),
    "gemma3": ("Gemma3", GEMMA | {"num_hidden_layers": 7}),
    "gemma3, scaled, cap": (
        "Gemma3",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
            "final_logit_softcapping": 6.0,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "gemma3, all local": ("Gemma3", GEMMA),
    "gemma3, all global": ("Gemma3", GEMMA | {"layer_types": ["full_attention"] * 5}),
    "mistral, no window": ("Mistral", LLAMA | {"sliding_window": None, "head_dim": 16}),
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
"""Config classes that are not named like the model's class."""
Published = Callable[..., tuple[Any, Path]]


def library() -> Any:
    """``transformers``, or the test is skipped."""
    return pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([sentences(seed) for seed in range(5)], 300)


@pytest.fixture
def published(tmp_path: Path, tokenizer: Tokenizer) -> Published:
    """Save a case, with ``changes`` to its config; returns the model and its folder."""

    def build(case: str, dtype: torch.dtype = torch.float32, name: str = "published", **save: Any) -> tuple[Any, Path]:
        family, settings = CASES[case]
        transformers = library()
        config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**json.loads(json.dumps(settings)))
        model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config)
        model = randomised(model.to(dtype))
        folder = tmp_path / name
        model.save_pretrained(folder, **save)
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        return model, folder

    return build


@torch.no_grad()
def randomised(model: Any) -> Any:
    """Randomise all weights: none is zero or one, so that a missing one changes the result."""
    generator = torch.Generator().manual_seed(0)
    zero_centered = "Gemma" in type(model).__name__ or getattr(model.config, "norm", None) == "zero_centered_rmsnorm"
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        gain = ("norm" in name.lower() or "ln_" in name) and not zero_centered
        parameter.copy_(noise * 0.15 + (1.0 if gain and name.endswith("weight") else 0.0))
    return model.eval()


def network(model: PortableModel) -> GPT:
    """The network in evaluation mode."""
    built = GPT(*model.shape)
    built.load_state_dict(model.weights)
    return built.eval()


def change(folder: Path, **fields: Any) -> None:
    """Change fields of a folder's ``config.json``; ``...`` removes one."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps({n: v for n, v in values.items() if v is not ...}), encoding="utf-8")


def ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(VOCABULARY, (3, length), generator=torch.Generator().manual_seed(1))
