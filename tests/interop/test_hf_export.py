"""Export to Hugging Face folders: supported models compute the same, unsupported settings are reported."""

import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_checkpoint import PortableModel, read_hf_checkpoint, write_hf_checkpoint
from lit_gpt_scratch.interop.model_family import ModelShape
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.positions import DEFAULT_ROTARY_FAST, ROTARY_SCALINGS, SCALINGS_FROM_TRAINED_CONTEXT
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import sentences
from tests.interop.conftest import LENGTH, library, network, randomised

TEXT = "the cat sees <|endoftext| a dog.\r\n\t Çé 東京 🎉  x"


KINDS = (
    "gpt2", "qwen3", "llama", "mistral", "qwen2", "olmo2", "smollm3", "mixtral", "qwen3_moe", "phi3", "gemma2",
    "gemma3", "gpt_oss",
)  # fmt: skip
GEMMA = {
    "norm": "zero_centered_rmsnorm", "norm_placement": "sandwich", "feed_forward": "geglu", "scaled_embeddings": True,
}  # fmt: skip


GPT_OSS = {
    "qk_norm": False, "bias": True, "attention_sinks": True, "feed_forward": "moe",
    "expert_activation": "clamped_swiglu",
}  # fmt: skip


def made(gpt: GPTConfig, tokenizer: Tokenizer, vocab_size: int = 307) -> PortableModel:
    """A model of this package with random weights, and more ids than the tokenizer uses."""
    from lit_gpt_scratch.model import GPT

    shape = ModelShape(gpt, vocab_size, LENGTH)
    return PortableModel(shape, randomised(GPT(*shape)).state_dict(), tokenizer)


def any_config(seed: int) -> GPTConfig:
    """A random config that some family can express."""
    rng = random.Random(seed)
    kind, mup = KINDS[seed % len(KINDS)], {}
    if seed // len(KINDS) % 3 == 1 and "gemma" not in kind:
        mup = {"parametrisation": "mup", "mup_base_width": 20, "mup_base_head_dim": 3}
    heads, group, width = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), 2 * rng.randint(2, 6)
    settings: dict[str, Any] = {
        "n_layer": rng.randint(1, 3), "n_head": heads * group, "n_embd": heads * group * width,
        "norm_eps": rng.choice([1e-3, 1e-6]), "tied_embeddings": rng.random() < 0.5,
        "vocab_multiple": rng.choice([1, 64]), "ffn_dim": rng.choice([None, 44]),
        "attention_backend": rng.choice(["auto", "manual"]),
        "initialisation": rng.choice(["zero", "gpt2", "normal", "xavier"]), **mup,
    }  # fmt: skip
    if kind == "gpt2":
        settings |= {"position": "learned", "norm": "layernorm", "feed_forward": "gelu", "bias": True, "qk_norm": False}
        return GPTConfig(**settings, dropout=rng.choice([0.0, 0.2]))
    settings |= {"n_kv_head": heads, "head_dim": rng.choice([None, 6, 16]), "rotary_base": rng.choice([100.0, 1e4])}
    settings["qk_norm"] = kind in ("qwen3", "qwen3_moe", "olmo2", "gemma3")
    if kind in ("mixtral", "qwen3_moe", "gpt_oss"):
        chosen = rng.randint(2, 4)
        settings |= {"feed_forward": "moe", "n_experts": rng.randint(chosen, 6), "experts_per_token": chosen}
        settings["n_embd"] = heads * group * 8  # grouped matrix products in transformers require this
    if kind == "gpt_oss":
        settings |= GPT_OSS | {"sliding_window": rng.choice([None, 5]), "n_layer": rng.choice([2, 3])}
        settings["sliding_window_pattern"] = 2 if settings["sliding_window"] and rng.random() < 0.7 else None
    if kind == "qwen3_moe":
        settings["normalize_gates"] = rng.random() < 0.5
    if kind == "olmo2":
        settings |= {"norm_placement": "output", "qk_norm_joint": True, "head_dim": None}
    elif kind == "qwen2":
        settings |= {"qkv_bias": True, "head_dim": None}
    elif kind == "smollm3":
        settings["rotary_skip_every"] = rng.randint(1, settings["n_layer"])
    elif kind in ("gemma2", "gemma3"):
        settings |= GEMMA | {
            "attention_scale": rng.choice([None, 20**-0.5]), "logit_softcap": rng.choice([None, 6.0]),
            "sliding_window": rng.choice([None, 5]), "n_layer": rng.choice([2, 5]),
        }  # fmt: skip
        if kind == "gemma2":
            settings["attention_softcap"] = rng.choice([None, 3.0])
        if settings["sliding_window"] and rng.random() < 0.7:
            settings["sliding_window_pattern"] = 2
            settings["rotary_local_base"] = rng.choice([None, 50.0]) if kind == "gemma3" else None
    if kind == "mistral":
        settings["sliding_window"] = rng.randint(1, 20)
        if rng.random() < 0.5:  # heads that do not divide the width, which Llama's config rejects
            settings |= {"sliding_window": None, "n_embd": settings["n_embd"] + 1, "head_dim": 6, "n_head": 2 * heads}
    elif kind == "phi3":
        share = 0.5 if width in (8, 12) and rng.random() < 0.7 else 1.0
        settings |= {"head_dim": None, "rotary_share": share, "sliding_window": rng.choice([None, 5, 60])}
    elif kind == "llama":
        settings["bias"] = rng.random() < 0.5
    scalings = [None, "ntk", "longrope"] if kind == "phi3" else [None, *ROTARY_SCALINGS]
    scaling = rng.choice(scalings)
    if scaling:
        settings |= {"rotary_scaling": scaling, "rotary_factor": rng.choice([1.5, 4.0])}
    if scaling in SCALINGS_FROM_TRAINED_CONTEXT:
        settings["rotary_trained_context"] = rng.choice([12, 32])
    if scaling == "dynamic":  # as a published config has it, the factor extends the original context to the context
        settings["rotary_trained_context"] = int(LENGTH / settings["rotary_factor"])
    if scaling in DEFAULT_ROTARY_FAST:
        settings["rotary_fast"] = rng.choice([None, 5.0])
        settings["rotary_truncate"] = scaling != "yarn" or rng.random() < 0.5
    if scaling == "longrope":
        rotated = (settings["head_dim"] or settings["n_embd"] // settings["n_head"]) * settings.get("rotary_share", 1)
        pairs = round(rotated) // 2
        factors = [rng.uniform(1, 20) for _ in range(2 * pairs)]
        settings |= {"rotary_short_factors": tuple(factors[:pairs]), "rotary_long_factors": tuple(factors[pairs:])}
    return GPTConfig(**settings)


@pytest.mark.parametrize("seed", range(10 * len(KINDS)))
def test_transformers_computes_the_same(tmp_path: Path, tokenizer: Tokenizer, seed: int) -> None:
    transformers = library()
    model = made(any_config(seed), tokenizer)
    architecture = write_hf_checkpoint(model, tmp_path / "hf", "phi3" if KINDS[seed % len(KINDS)] == "phi3" else None)
    reference, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert type(reference).__name__ == architecture
    assert not any(loading_info.values()), loading_info
    x = torch.randint(model.shape.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    ours, expected = network(model), reference.eval()(x).logits.detach()
    assert expected.shape == (2, LENGTH, model.shape.vocab_size)
    got = ours(x).detach()
    assert got.std() > 0.1
    assert (got - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert (network(read_hf_checkpoint(tmp_path / "hf"))(x) - got).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("settings", "architecture"),
    [
        ({}, "Qwen3ForCausalLM"),
        ({"qk_norm": False}, "LlamaForCausalLM"),
        ({"qk_norm": False, "sliding_window": 7}, "MistralForCausalLM"),
        ({"qk_norm": False, "bias": True}, "LlamaForCausalLM"),
        ({"qk_norm": False, "qkv_bias": True}, "Qwen2ForCausalLM"),
        ({"qk_norm": False, "qkv_bias": True, "bias": True}, "LlamaForCausalLM"),
        ({"qk_norm_joint": True, "norm_placement": "output"}, "Olmo2ForCausalLM"),
        ({"qk_norm": False, "rotary_skip_every": 1}, "SmolLM3ForCausalLM"),
        ({"qk_norm": False, "feed_forward": "moe"}, "MixtralForCausalLM"),
        ({"feed_forward": "moe"}, "Qwen3MoeForCausalLM"),
        ({"qk_norm": False, "rotary_share": 0.5}, "Phi3ForCausalLM"),
        (GEMMA | {"qk_norm": False}, "Gemma2ForCausalLM"),
        (GEMMA, "Gemma3ForCausalLM"),
        (GPT_OSS, "GptOssForCausalLM"),
        (
            {"qk_norm": False, "position": "learned", "norm": "layernorm", "feed_forward": "gelu", "bias": True},
            "GPT2LMHeadModel",
        ),
    ],
)
def test_family_is_chosen_by_the_config(
    tmp_path: Path, tokenizer: Tokenizer, settings: dict[str, Any], architecture: str
) -> None:
    model = made(GPTConfig(n_layer=1, n_head=2, n_embd=32, **settings), tokenizer)
    (tmp_path / "hf").mkdir()  # an empty folder may exist
    assert write_hf_checkpoint(model, tmp_path / "hf") == architecture
    config = json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [architecture]
    assert config["eos_token_id"] == config["bos_token_id"] == tokenizer.end_of_text
    assert config["dtype"] == "float32"
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram", "char", "byte"])
@pytest.mark.parametrize("family", [{}, {"qk_norm": False}, {"qk_norm": False, "sliding_window": 7}])
def test_exported_tokenizer_loads_in_transformers(tmp_path: Path, kind: str, family: dict[str, Any]) -> None:
    transformers = library()
    tokenizer = Tokenizer.train([sentences(seed) for seed in range(5)], 600, kind)
    gpt = GPTConfig(n_layer=1, n_head=1, n_embd=8, **family)
    write_hf_checkpoint(made(gpt, tokenizer, tokenizer.vocab_size), tmp_path / "hf")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert reference(TEXT)["input_ids"] == tokenizer.encode(TEXT)
    assert reference.decode(tokenizer.encode(TEXT)) == tokenizer.decode(tokenizer.encode(TEXT))
    assert reference.eos_token_id == reference.bos_token_id == tokenizer.end_of_text
    assert len(reference) == tokenizer.vocab_size
    assert reference.model_max_length == LENGTH


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"smear": True, "bigram_rows": 50}, ["qwen3", "smear is True", "bigram_rows is 50"]),
        ({"value_embeddings": True}, ["value_embeddings"]),
        ({"residual_scalars": True}, ["residual_scalars"]),
        ({"position": "alibi", "qk_norm": False}, ["llama", "position is alibi (must be rotary)"]),
        ({"norm_placement": "post"}, ["norm_placement is post"]),
        ({"norm_placement": "sandwich"}, ["norm_placement is sandwich"]),
        ({"logit_softcap": 15.0, "attention_softcap": 20.0}, ["logit_softcap is 15.0", "attention_softcap is 20.0"]),
        ({"bias": True}, ["bias"]),
        ({"sliding_window": 5}, ["sliding_window is 5"]),
        ({"feed_forward": "relu2"}, ["feed_forward is relu2 (must be swiglu)"]),
        ({"attention_sinks": True}, ["attention_sinks is True"]),
        ({"feed_forward": "moe", "bias": True}, ["qwen3_moe", "bias is True (must be False)"]),
        (GPT_OSS | {"bias": False}, ["gpt_oss", "bias is False (must be True)"]),
        (GPT_OSS | {"expert_activation": "geglu"}, ["expert_activation is geglu (must be clamped_swiglu)"]),
        (
            GPT_OSS | {"n_shared_experts": 1, "router_scores": "sigmoid", "normalize_gates": False},
            ["n_shared_experts is 1", "router_scores is sigmoid", "normalize_gates is False (must be True)"],
        ),
        (GEMMA | {"attention_scale": 0.3}, ["attention_scale is 0.3 (must be the inverse square root of an integer)"]),
        (GEMMA | {"n_embd": 33, "head_dim": 16}, ["n_embd is 33 (must be a multiple of n_head, which is 2)"]),
        ({"rotary_share": 0.5}, ["rotary_share is 0.5"]),
        ({"attention": "latent"}, ["attention is latent (must be None)"]),
        ({"attention": "lit_gpt_scratch.model.attention.Attention"}, ["attention is lit_gpt_scratch.model.attention"]),
        (
            {
                "qk_norm": False, "position": "learned", "norm": "layernorm", "feed_forward": "gelu", "bias": True,
                "n_kv_head": 1, "head_dim": 8,
            },
            ["gpt2", "n_kv_head is 1 (must equal n_head, 2)", "head_dim is 8 (must equal n_embd / n_head, 16)"],
        ),
    ],
)  # fmt: skip
def test_unsupported_settings_are_reported(
    tmp_path: Path, tokenizer: Tokenizer, settings: dict[str, Any], messages: list[str]
) -> None:
    model = made(GPTConfig(**({"n_layer": 1, "n_head": 2, "n_embd": 32} | settings)), tokenizer)
    with pytest.raises(UserError) as error:
        write_hf_checkpoint(model, tmp_path / "hf")
    for message in messages:
        assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_family_on_request(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A model that several families can express; an imported one keeps its family as long as that supports it."""
    gpt = GPTConfig(n_layer=1, n_head=2, n_embd=32, qk_norm=False)
    model = made(gpt, tokenizer)
    assert write_hf_checkpoint(model, tmp_path / "llama") == "LlamaForCausalLM"
    for name, architecture in (("phi3", "Phi3ForCausalLM"), ("mistral", "MistralForCausalLM")):
        assert write_hf_checkpoint(model, tmp_path / name, name) == architecture
        loaded = library().AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        x = torch.randint(307, (2, LENGTH))
        assert (loaded(x).logits - network(model)(x)).abs().max() <= 1e-5
    imported = read_hf_checkpoint(tmp_path / "phi3")
    assert write_hf_checkpoint(imported, tmp_path / "again") == "Phi3ForCausalLM"
    assert write_hf_checkpoint(imported, tmp_path / "other", "llama") == "LlamaForCausalLM"
    changed = made(replace(gpt, rotary_skip_every=1), imported.tokenizer)
    assert write_hf_checkpoint(changed, tmp_path / "changed") == "SmolLM3ForCausalLM"
    with pytest.raises(UserError, match=r"cannot be exported to phi3; .* rotary_skip_every is 1 \(must be"):
        write_hf_checkpoint(changed, tmp_path / "none", "phi3")
    with pytest.raises(UserError, match="model_type is bert; it must be one of gemma2, gemma3_text, gpt2, gpt_oss"):
        write_hf_checkpoint(changed, tmp_path / "none", "bert")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rotary_scaling": "linear"}, "rotary_scaling is linear"),
        ({"head_dim": 8}, "head_dim is 8 (must equal n_embd / n_head, 16)"),
        ({"rotary_share": 0.62}, "rotary_share is 0.62 (must be a fraction of the 16 channels)"),
    ],
)
def test_what_phi3_does_not_support(
    tmp_path: Path, tokenizer: Tokenizer, settings: dict[str, Any], message: str
) -> None:
    gpt = GPTConfig(n_layer=1, n_head=2, n_embd=32, qk_norm=False, **settings)
    with pytest.raises(UserError) as error:
        write_hf_checkpoint(made(gpt, tokenizer), tmp_path / "hf", "phi3")
    assert message in str(error.value)


def test_context_that_a_dynamic_scaling_does_not_extend_to(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """``config.json`` has one field for the original context and none for the context."""
    gpt = GPTConfig(
        n_layer=1, n_head=2, n_embd=32, rotary_scaling="dynamic", rotary_factor=2.0, rotary_trained_context=20
    )
    with pytest.raises(UserError, match=r"a context of 40 tokens .*, but the context is 48"):
        write_hf_checkpoint(made(gpt, tokenizer), tmp_path / "hf")
    assert not any(tmp_path.iterdir())


def test_new_config_field_is_unsupported(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``GPTConfig`` field that no family knows is reported, never ignored."""
    from lit_gpt_scratch.interop import model_family
    from lit_gpt_scratch.interop.hf_checkpoint import FAMILIES

    monkeypatch.setattr(model_family, "COMMON_FIELDS", model_family.COMMON_FIELDS - {"n_layer"})
    assert all(
        "n_layer is 1 (must be 4)" in one.unsupported_settings(GPTConfig(n_layer=1)) for one in FAMILIES.values()
    )


def test_dropout_that_is_not_exported_is_reported(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lit_gpt_scratch"):
        write_hf_checkpoint(made(GPTConfig(n_layer=1, n_head=2, n_embd=32, dropout=0.1), tokenizer), tmp_path / "hf")
    assert "dropout is 0.1, but qwen3 does not support dropout" in caplog.text


def test_non_empty_folder_is_unchanged(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = made(GPTConfig(n_layer=1, n_head=2, n_embd=32), tokenizer)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for place in ("hf", "file"):
        with pytest.raises(UserError, match="already exists and is not an empty folder"):
            write_hf_checkpoint(model, tmp_path / place)
    with pytest.raises(UserError, match="cannot write"):
        write_hf_checkpoint(model, tmp_path / "file" / "hf")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "hf", "notes.txt"]


def test_failed_export_leaves_no_folder(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_gpt_scratch.interop import hf_checkpoint

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_checkpoint, "write_safetensors", full)
    with pytest.raises(UserError, match=r"cannot write .*hf: No space left on device"):
        write_hf_checkpoint(made(GPTConfig(n_layer=1, n_head=2, n_embd=32), tokenizer), tmp_path / "hf")
    assert not any(tmp_path.iterdir())


def test_weights_of_another_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = made(GPTConfig(n_layer=1, n_head=2, n_embd=32), tokenizer)
    del model.weights["norm.weight"]
    with pytest.raises(UserError, match=r"tensors in the checkpoint do not match its config \(missing: norm\.weight"):
        write_hf_checkpoint(model, tmp_path / "hf")
