"""Imported models have the logits and gradients of ``transformers``, and export to the same tensors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.interop.hf_checkpoint import FAMILIES, PortableModel, read_hf_checkpoint, write_hf_checkpoint
from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.model import GPT
from tests.interop.conftest import CASES, LENGTH, LLAMA3, YARN, Published, change, ids, library, network

EXACT = 1e-5


def logits(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Logits of the ``transformers`` model, in float32."""
    out: torch.Tensor = model(x).logits
    return out


def split_experts(reference: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Gradients of the ``transformers`` model, which stacks experts, under the names in its files, which do not."""
    if reference.config.model_type == "gpt_oss":  # whose files stack them, too
        yield from ((name, parameter.grad) for name, parameter in reference.named_parameters())
        return
    mixtral = reference.config.model_type == "mixtral"
    for name, parameter in reference.named_parameters():
        stem, _, kind = name.rpartition(".experts.")
        if not stem:
            yield name.replace("mlp.gate.", "block_sparse_moe.gate.") if mixtral else name, parameter.grad
        for expert, gradient in enumerate(parameter.grad if stem else ()):
            names, parts = (
                (["down_proj"], [gradient]) if kind == "down_proj" else (["gate_proj", "up_proj"], gradient.chunk(2))
            )
            for hf_name, part in zip(names, parts, strict=True):
                hf_name = {"down_proj": "w2", "gate_proj": "w1", "up_proj": "w3"}[hf_name] if mixtral else hf_name
                folder = stem.replace("mlp", "block_sparse_moe") if mixtral else stem
                yield f"{folder}.experts.{expert}.{hf_name}.weight", part


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(published: Published, case: str) -> None:
    reference, folder = published(case)
    model = read_hf_checkpoint(folder)
    ours = network(model)
    x = ids()
    compare(model, ours, reference, ours(x), logits(reference, x))


@pytest.mark.parametrize("case", [case for case in CASES if "gemma" in case or "gpt_oss" in case])
def test_packed_documents_equal_transformers(published: Published, case: str) -> None:
    """Three documents per row, one of them longer than the sliding window, which does not extend beyond a document."""
    reference, folder = published(case)
    model, x = read_hf_checkpoint(folder), ids()
    ours, document_ids = network(model), torch.tensor([0] * 3 + [1] * (LENGTH - 12) + [2] * 9).expand(3, -1)
    positions = torch.cat([torch.arange(n) for n in (3, LENGTH - 12, 9)]).expand(3, -1)
    index = torch.arange(LENGTH)
    distance = index[:, None] - index
    visible = (distance >= 0) & (document_ids[:, None, :, None] == document_ids[:, None, None, :])  # (3, 1, T, T)
    masks = {
        kind: torch.zeros(3, 1, LENGTH, LENGTH).masked_fill_(~seen, torch.finfo().min)
        for kind, seen in (("full_attention", visible), ("sliding_attention", visible & (distance < 5)))
    }
    expected = reference(x, attention_mask=masks, position_ids=positions, use_cache=False).logits
    assert (expected - logits(reference, x)).abs().max() > 0.1
    compare(model, ours, reference, ours(x, document_ids), expected)


def compare(model: PortableModel, ours: GPT, reference: Any, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare logits and the gradients of all parameters with those of ``transformers``."""
    assert expected.std() > 0.3  # so that the comparison is not between values near zero
    assert (got - expected).abs().max() <= EXACT
    target = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (got * target).sum().backward()
    (expected * target).sum().backward()
    family = FAMILIES[reference.config.model_type]
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters(remove_duplicate=False)}
    translated = dict(family.to_hf_weights(model.shape.gpt, gradients))
    known = dict(split_experts(reference))
    assert translated.keys() == known.keys()
    for name, parameter in known.items():
        scale = parameter.abs().max()
        assert scale > 0, name
        assert ((translated[name] - parameter).abs().max() / scale) <= EXACT, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise_exact(published: Published, tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    reference, folder = published(case, dtype)
    model = read_hf_checkpoint(folder)
    assert {tensor.dtype for tensor in model.weights.values()} == {dtype}
    again = tmp_path / "again"
    assert write_hf_checkpoint(model, again) == type(reference).__name__
    before, after = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]), name
    assert read_hf_checkpoint(again).shape == model.shape
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "published"]  # no partial files
    loaded, loading_info = load(again)
    assert loaded.dtype == dtype
    assert not any(loading_info.values()), loading_info
    assert torch.equal(logits(loaded, ids()), logits(load(folder)[0], ids()))


@pytest.mark.parametrize("case", ["llama, dynamic", "llama, longrope", "phi3, longrope, window", "phi4"])
def test_rotations_that_depend_on_the_length(published: Published, case: str) -> None:
    """Texts up to and beyond the original context, and cached decoding across it, which encodes the text again."""
    reference, folder = published(case)
    model = read_hf_checkpoint(folder)
    original, context = (48, 192) if case == "llama, dynamic" else (24, 48)
    assert (model.shape.gpt.rotary_trained_context, model.shape.block_size) == (original, context)
    ours = network(model)
    for length in (1, original - 1, original, original + 1, context - 1, context):
        x = ids(length)
        assert (ours(x) - logits(reference, x)).abs().max() <= EXACT, length
    text = ids(original - 2)[:1]
    found = generate(ours, text.tolist(), 6, Sampling(temperature=0.0), [0], end_of_text=-1)
    for token in (token for _, token in found if token is not None):
        assert token == logits(reference, text)[0, -1].argmax()
        text = torch.cat((text, torch.tensor([[token]])), 1)


@pytest.mark.parametrize("case", ["gpt_oss", "gemma3"])
def test_cached_generation_beyond_the_window(published: Published, case: str) -> None:
    reference, folder = published(case)
    text = ids(4)[:1]
    found = generate(network(read_hf_checkpoint(folder)), text.tolist(), 20, Sampling(temperature=0.0), [0], -1)
    for token in (token for _, token in found if token is not None):
        assert token == logits(reference, text)[0, -1].argmax()
        text = torch.cat((text, torch.tensor([[token]])), 1)
    assert text.size(1) == 24


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model loaded by ``AutoModel``, and its report of missing and unexpected names."""
    model, loading_info = library().AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return model.eval(), loading_info


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen3, tied"])
def test_sharded_folder(published: Published, case: str) -> None:
    _, whole = published(case)
    _, sharded = published(case, name="sharded", max_shard_size="20KB")
    assert (sharded / "model.safetensors.index.json").is_file()
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, many = read_hf_checkpoint(whole), read_hf_checkpoint(sharded)
    assert one.shape == many.shape
    assert one.weights.keys() == many.weights.keys()
    assert all(torch.equal(one.weights[name], many.weights[name]) for name in one.weights)


def test_weights_are_not_a_memory_map_of_the_file(published: Published) -> None:
    _, folder = published("llama")
    model, path = read_hf_checkpoint(folder), folder / "model.safetensors"
    weights = dict(model.weights)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    content = path.read_bytes()
    path.write_bytes(b"\0" * len(content))
    assert all(torch.equal(before[name], weights[name]) for name in before)
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file, or is corrupted"):
        dict(model.weights)


@pytest.mark.parametrize("case", ["gpt2", "llama, biases, tied", "qwen3, tied"])
def test_bare_names_and_derived_buffers(published: Published, case: str) -> None:
    """The first published files: names of the bare model, with masks and rotary frequencies."""
    reference, folder = published(case)
    path = folder / "model.safetensors"
    weights = {name.split(".", 1)[1]: tensor for name, tensor in load_file(path).items()}
    weights |= {
        f"h.0.attn.{mask}": torch.ones(1, 1, 4, 4, dtype=torch.bool) for mask in ("bias", "masked_bias")
    } | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # fmt: skip
    save_file(weights, path)
    assert (network(read_hf_checkpoint(folder))(ids()) - logits(reference, ids())).abs().max() <= EXACT


def test_tied_head_may_be_stored_twice(published: Published) -> None:
    reference, folder = published("gpt2")
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}, path)
    assert (network(read_hf_checkpoint(folder))(ids()) - logits(reference, ids())).abs().max() <= EXACT


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0}, LLAMA3, YARN])
@pytest.mark.parametrize("word", ["rope_type", "type"])
def test_old_rope_layout(published: Published, rope: dict[str, Any] | None, word: str) -> None:
    reference, folder = published("llama")
    inner = None if rope is None else {**rope, word: rope["rope_type"]}
    for name in ("rope_theta", *(["rope_type"] if word == "type" else [])):
        if inner:
            inner.pop(name)
    change(folder, rope_parameters=..., rope_theta=500.0, rope_scaling=inner)
    reference, _ = load(folder)
    assert (network(read_hf_checkpoint(folder))(ids()) - logits(reference, ids())).abs().max() <= EXACT


def test_missing_fields_have_the_defaults_of_transformers(published: Published) -> None:
    """Fields with the defaults of ``transformers``."""
    _, folder = published("llama")
    absent = "tie_word_embeddings rms_norm_eps attention_bias mlp_bias attention_dropout hidden_act rope_parameters"
    change(folder, **dict.fromkeys(absent.split(), ...))
    assert (network(read_hf_checkpoint(folder))(ids()) - logits(load(folder)[0], ids())).abs().max() <= EXACT
    _, folder = published("mistral, no window", name="mistral")
    change(folder, sliding_window=..., max_position_embeddings=8192)
    gpt, _, block_size = read_hf_checkpoint(folder).shape
    assert (gpt.sliding_window, block_size) == (4096, 8192)
    _, folder = published("gpt2", name="gpt2")
    absent = "n_inner resid_pdrop embd_pdrop attn_pdrop tie_word_embeddings scale_attn_weights activation_function"
    change(folder, **dict.fromkeys(absent.split(), ...))
    gpt = read_hf_checkpoint(folder).shape.gpt
    assert (gpt.ffn_width, gpt.dropout, gpt.tied_embeddings) == (128, 0.1, True)


def test_trained_context_at_the_top_level(published: Published) -> None:
    _, folder = published("llama, yarn")
    change(folder, original_max_position_embeddings=24)
    assert read_hf_checkpoint(folder).shape.gpt.rotary_trained_context == 24
    assert (network(read_hf_checkpoint(folder))(ids()) - logits(load(folder)[0], ids())).abs().max() <= EXACT
    change(
        folder, original_max_position_embeddings=..., rope_parameters={**YARN, "original_max_position_embeddings": None}
    )
    assert read_hf_checkpoint(folder).shape.gpt.rotary_trained_context == LENGTH


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Qwen2", "Olmo2", "SmolLM3", "Phi3"])
def test_minimal_config(family: str) -> None:
    known = {
        "vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 9, "num_attention_heads": 64,
        "intermediate_size": 32, "max_position_embeddings": 48,
    }  # fmt: skip
    reference = getattr(library(), f"{family}Config")(**known)
    gpt = FAMILIES[family.lower()].read_config(HFConfigReader(Path("config.json"), dict(known))).gpt
    assert gpt.kv_heads == reference.num_key_value_heads
    assert gpt.head_width == getattr(reference, "head_dim", 256 // 64)
    rotates = getattr(reference, "no_rope_layers", [1] * 9)
    assert rotates == [int(not gpt.rotary_skip_every or (n + 1) % gpt.rotary_skip_every != 0) for n in range(9)]
    assert gpt.norm_eps == reference.rms_norm_eps
    assert gpt.tied_embeddings == reference.tie_word_embeddings
    assert gpt.rotary_base == reference.rope_parameters["rope_theta"]
    assert gpt.sliding_window == getattr(reference, "sliding_window", None)


def test_files_of_phi4_mini(published: Published) -> None:
    """The published files have the older format, with the fraction of rotated channels at the top level."""
    _, folder = published("phi4")
    rope = json.loads((folder / "config.json").read_text(encoding="utf-8"))["rope_parameters"]
    old = {"type": "longrope", **{name: rope[name] for name in ("short_factor", "long_factor")}}
    change(
        folder, rope_parameters=..., rope_theta=500.0, rope_scaling=old, partial_rotary_factor=0.75,
        attention_bias=False, mlp_bias=False, lm_head_bias=False, full_attn_mod=1, sliding_window=262_144,
    )  # fmt: skip
    assert read_hf_checkpoint(folder).shape.gpt.rotary_share == 0.75
    assert (network(read_hf_checkpoint(folder))(ids()) - logits(load(folder)[0], ids())).abs().max() <= EXACT
    change(folder, original_max_position_embeddings=..., max_position_embeddings=8192)
    assert read_hf_checkpoint(folder).shape.gpt.rotary_trained_context == 4096
    assert (network(read_hf_checkpoint(folder))(ids()) - logits(load(folder)[0], ids())).abs().max() <= EXACT


def test_minimal_config_of_gpt_oss(published: Published) -> None:
    """Fields with the defaults of ``transformers``."""
    known = {"hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 16, "intermediate_size": 32}
    reference = library().GptOssConfig(**known)
    fields = known | {"vocab_size": 64, "max_position_embeddings": 131_072}
    gpt = FAMILIES["gpt_oss"].read_config(HFConfigReader(Path("config.json"), fields)).gpt
    assert (gpt.kv_heads, gpt.head_width) == (reference.num_key_value_heads, reference.head_dim)
    assert (gpt.n_experts, gpt.experts_per_token) == (reference.num_local_experts, reference.num_experts_per_tok)
    assert [gpt.is_local(layer) for layer in range(5)] == [kind != "full_attention" for kind in reference.layer_types]
    assert (gpt.sliding_window, gpt.norm_eps) == (reference.sliding_window, reference.rms_norm_eps)
    assert gpt.tied_embeddings == reference.tie_word_embeddings
    rope = dict(reference.rope_parameters)
    assert (gpt.rotary_base, gpt.rotary_scaling, gpt.rotary_factor, gpt.rotary_trained_context) == (
        rope["rope_theta"], rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"],
    )  # fmt: skip
    assert (gpt.rotary_slow, gpt.rotary_fast, gpt.rotary_truncate) == (
        rope["beta_slow"], rope["beta_fast"], rope["truncate"],
    )  # fmt: skip
    _, folder = published("gpt_oss")
    change(folder, rope_parameters=..., layer_types=..., max_position_embeddings=131_072, attention_bias=...)
    assert (network(read_hf_checkpoint(folder))(ids()) - logits(load(folder)[0], ids())).abs().max() <= EXACT


def test_published_layout_of_gpt_oss(published: Published) -> None:
    """The published files have the older format of the rope settings, and fields that ``transformers`` ignores."""
    _, folder = published("gpt_oss")
    change(
        folder, rope_parameters=..., rope_theta=150_000, initial_context_length=4096, experts_per_token=4,
        rope_scaling=YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}, router_aux_loss_coef=0.9,
        swiglu_limit=7.0,
    )  # fmt: skip
    assert (network(read_hf_checkpoint(folder))(ids()) - logits(load(folder)[0], ids())).abs().max() <= EXACT


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3Text"])
def test_minimal_config_of_gemma(family: str) -> None:
    known = {"vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 13, "num_attention_heads": 8,
             "intermediate_size": 32, "max_position_embeddings": 48}  # fmt: skip
    reference = getattr(library(), f"{family}Config")(**known)
    gpt = FAMILIES[reference.model_type].read_config(HFConfigReader(Path("config.json"), dict(known))).gpt
    assert (gpt.kv_heads, gpt.head_width) == (reference.num_key_value_heads, reference.head_dim)
    assert [gpt.is_local(layer) for layer in range(13)] == [kind != "full_attention" for kind in reference.layer_types]
    assert gpt.sliding_window == reference.sliding_window
    assert gpt.norm_eps == reference.rms_norm_eps
    assert gpt.tied_embeddings == reference.tie_word_embeddings
    assert (gpt.attention_scale or gpt.head_width**-0.5) == reference.query_pre_attn_scalar**-0.5
    assert (gpt.attention_softcap, gpt.logit_softcap) == (
        reference.attn_logit_softcapping, reference.final_logit_softcapping,
    )  # fmt: skip
    ropes = reference.rope_parameters
    if family == "Gemma2":
        assert gpt.rotary_base == ropes["rope_theta"]
        assert gpt.rotary_local_base is None
    else:
        assert gpt.rotary_base == ropes["full_attention"]["rope_theta"]
        assert gpt.rotary_local_base == ropes["sliding_attention"]["rope_theta"]


def test_old_gemma3_layout(published: Published) -> None:
    """As published with Gemma 3: rope settings at the top level, and a pattern instead of ``layer_types``."""
    _, folder = published("gemma3")
    old = {"rope_theta": 700.0, "rope_local_base_freq": 90.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    change(folder, rope_parameters=..., layer_types=..., sliding_window_pattern=3, **old)
    model = read_hf_checkpoint(folder)
    gpt = model.shape.gpt
    assert (gpt.sliding_window_pattern, gpt.rotary_base, gpt.rotary_local_base) == (3, 700.0, 90.0)
    assert (gpt.rotary_scaling, gpt.rotary_factor) == ("linear", 8.0)
    assert (network(model)(ids()) - logits(load(folder)[0], ids())).abs().max() <= EXACT
    change(folder, sliding_window_pattern=1)
    assert read_hf_checkpoint(folder).shape.gpt.sliding_window is None


@pytest.mark.parametrize(("rotates", "every"), [([1, 1, 0, 1, 1, 0, 1], 3), ([1] * 5, None), ([0] * 5, 1)])
def test_layers_without_positions(published: Published, rotates: list[int], every: int | None) -> None:
    """The list takes precedence over the interval, and may be longer than the number of layers."""
    _, folder = published("smollm3")
    change(folder, no_rope_layers=rotates, no_rope_layer_interval=0)
    model = read_hf_checkpoint(folder)
    assert model.shape.gpt.rotary_skip_every == every
    assert (network(model)(ids()) - logits(load(folder)[0], ids())).abs().max() <= EXACT


def test_gpt2_tokenizer_files(published: Published) -> None:
    _, folder = published("gpt2")
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    expected = read_hf_checkpoint(folder).tokenizer
    path.unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    text = "the cat sees a dog.\nÇé 東京"
    found = read_hf_checkpoint(folder).tokenizer
    assert found.encode(text) == expected.encode(text)
    assert found.end_of_text == expected.end_of_text
