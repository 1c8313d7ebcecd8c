"""Random architectures: each one builds, is causal, trains, survives a checkpoint, and decodes with a cache."""

import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.checkpoint import checkpoint_io
from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX, load_model
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from lit_gpt_scratch.checkpoint.safetensors_export import export_safetensors
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.config import EXPERT_SETTINGS
from lit_gpt_scratch.model.positions import DEFAULT_ROTARY_FAST, SCALINGS_FROM_TRAINED_CONTEXT
from lit_gpt_scratch.optim import AdamW, Muon
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import randomised

VOCAB, CONTEXT = 257, 12
HINTS = get_type_hints(GPTConfig)
OWN = "tests.custom_attention.DoubledAttention"


def choices(name: str) -> list[str]:
    """All values of an option, from its type."""
    return [c for a in get_args(HINTS[name]) for c in (get_args(a) or [a]) if isinstance(c, str)]


@st.composite
def configs(draw: st.DrawFn) -> GPTConfig:
    """Any valid architecture: every option is drawn, from the values that the others allow."""
    kv, group, half = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 4))
    position, scaling = draw(st.sampled_from(choices("position"))), None
    if position == "rotary":
        scaling = draw(st.none() | st.sampled_from(choices("rotary_scaling")))
    trained = draw(st.integers(4, 64)) if scaling in SCALINGS_FROM_TRAINED_CONTEXT else None
    has_turns = scaling in DEFAULT_ROTARY_FAST
    attention = draw(st.sampled_from([None, *choices("attention"), OWN]))
    latent = attention == "latent"
    parametrisation = "standard" if latent else draw(st.sampled_from(choices("parametrisation")))
    share = draw(st.sampled_from([1.0, 0.5])) if position == "rotary" and half == 4 and not latent else 1.0
    rotated = 4 if latent else round(half * share)
    pairs = tuple(1.0 + n for n in range(rotated)) if scaling == "longrope" else None
    dropout, softcap = draw(st.sampled_from([0.0, 0.1])), draw(st.sampled_from([None, 5.0]))
    n_layer, window = draw(st.integers(1, 3)), draw(st.none() | st.integers(1, CONTEXT + 2))
    every = draw(st.none() | st.integers(2, n_layer)) if window and n_layer > 1 else None
    drawn = {
        "n_layer": n_layer,
        "n_head": kv * group,
        "n_embd": kv * group * 2 * half if draw(st.booleans()) else draw(st.sampled_from([16, 24])),
        "n_kv_head": None if latent else kv,
        "head_dim": 2 * half,
        "attention": attention,
        "attention_backend": draw(st.sampled_from(["auto", "manual"] if softcap else ["auto", "sdpa", "manual"])),
        "attention_scale": None if latent else draw(st.sampled_from([None, 0.3])),
        "attention_softcap": softcap,
        "attention_sinks": draw(st.booleans()),
        "sliding_window": window,
        "sliding_window_pattern": every,
        "latent_kv_rank": draw(st.none() | st.integers(1, 40)) if latent else None,
        "latent_query_rank": draw(st.none() | st.integers(1, 40)) if latent else None,
        "latent_rope_dim": 8 if latent else None,
        "latent_value_dim": draw(st.none() | st.integers(1, 12)) if latent else None,
        "qk_norm": (qk_norm := draw(st.booleans())),
        "qk_norm_joint": qk_norm and not latent and draw(st.booleans()),
        "position": position,
        "rotary_base": draw(st.sampled_from([100.0, 10_000.0])),
        "rotary_local_base": draw(st.none() | st.just(50.0)) if every and position == "rotary" else None,
        "rotary_share": share,
        "rotary_skip_every": draw(st.sampled_from([None, 1, 2])) if position == "rotary" else None,
        "rotary_scaling": scaling,
        "rotary_factor": draw(st.floats(1.0, 8.0)) if scaling else 1.0,
        "rotary_trained_context": trained,
        "rotary_slow": draw(st.sampled_from([None, 0.5])) if has_turns else None,
        "rotary_fast": draw(st.sampled_from([None, 2.0])) if has_turns else None,
        "rotary_truncate": scaling != "yarn" or draw(st.booleans()),
        "rotary_short_factors": pairs,
        "rotary_long_factors": pairs and pairs[::-1],
        "norm": draw(st.sampled_from(choices("norm"))),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "norm_placement": draw(st.sampled_from(choices("norm_placement"))),
        "bias": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        "feed_forward": draw(st.sampled_from(choices("feed_forward"))),
        "ffn_dim": draw(st.none() | st.integers(1, 40)),
        "n_experts": (n_experts := draw(st.integers(1, 5))),
        "experts_per_token": (per_token := draw(st.integers(1, n_experts))),
        "n_shared_experts": draw(st.integers(0, 2)),
        "expert_activation": draw(st.sampled_from(choices("expert_activation"))),
        "router_scores": draw(st.sampled_from(choices("router_scores"))),
        "normalize_gates": per_token > 1 and draw(st.booleans()),
        "load_balance_loss": 0.01,
        "router_z_loss": 0.001,
        "expert_bias_rate": draw(st.sampled_from([None, 0.001])),
        "tied_embeddings": draw(st.booleans()),
        "scaled_embeddings": parametrisation == "standard" and draw(st.booleans()),
        "vocab_multiple": draw(st.sampled_from([1, 64])),
        "logit_softcap": draw(st.sampled_from([None, 15.0])),
        "value_embeddings": not latent and draw(st.booleans()),
        "bigram_rows": draw(st.sampled_from([None, 50])),
        "smear": draw(st.booleans()),
        "residual_scalars": draw(st.booleans()),
        "multi_token_depth": draw(st.integers(0, 2)),
        "dropout": dropout,
        "initialisation": draw(st.sampled_from(choices("initialisation"))),
        "parametrisation": parametrisation,
        "mup_base_width": draw(st.sampled_from([2, 24, 200])) if parametrisation == "mup" else None,
        "mup_base_head_dim": draw(st.sampled_from([None, 1, 16])) if parametrisation == "mup" else None,
    }
    if drawn["feed_forward"] != "moe":
        drawn |= {field.name: field.default for field in fields(GPTConfig) if field.name in EXPERT_SETTINGS}
    assert drawn.keys() == {field.name for field in fields(GPTConfig)}  # a new option must be added here
    return GPTConfig(**drawn)


def assert_causal(config: GPTConfig) -> None:
    model = randomised(config, VOCAB, CONTEXT)
    ids = torch.randint(VOCAB, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert before.shape == (1, CONTEXT, VOCAB)
    if config.feed_forward == "moe":  # the products of an expert depend on its number of tokens in their last bits
        torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7])


def assert_trains(config: GPTConfig) -> None:
    torch.manual_seed(0)
    model, ids = GPT(config, VOCAB, CONTEXT), torch.randint(VOCAB, (4, CONTEXT + 1))
    documents = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3]).expand(4, -1)
    for recipe in (Muon(), AdamW()):
        optimizer, losses = recipe.build(model), []
        for _ in range(2):
            nats, tokens = token_cross_entropy(model(ids[:, :-1], documents), ids[:, 1:])
            (nats / tokens).backward()
            losses.append((nats / tokens).item())
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.tensor(losses).isfinite()), losses
        assert losses[1] != losses[0]


def assert_survives_a_checkpoint(config: GPTConfig, tokenizer: Tokenizer, folder: Path) -> None:
    model = randomised(config, VOCAB, CONTEXT)
    contents = CheckpointMetadata(asdict(config), VOCAB, CONTEXT, tokenizer.to_json())
    weights = {STATE_PREFIX + name: weight for name, weight in model.state_dict().items()}
    checkpoint = {METADATA_KEY: asdict(contents), "state_dict": weights}
    checkpoint_io.save_checkpoint(checkpoint, folder / "a.ckpt")
    export_safetensors(checkpoint, STATE_PREFIX, folder / "a.safetensors")
    ids = torch.arange(CONTEXT)[None]
    for name in ("a.ckpt", "a.safetensors"):
        again, _ = load_model(folder / name, trusted=config.attention)
        with torch.no_grad():
            assert torch.equal(again(ids), model(ids))


def assert_cache_changes_no_token(config: GPTConfig) -> None:
    model = randomised(config, VOCAB, CONTEXT).double()
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for row, token in generate(model, prompts, 20, Sampling(temperature=0.0), [0, 0, 0], end_of_text=-1):
        found[row] += [] if token is None else [token]
    for row, prompt in enumerate(prompts):
        seen = list(prompt)
        for token in found[row]:
            with torch.no_grad():
                logits = model(torch.tensor([seen]))[0, -1]
            assert logits[token] >= logits.max() - 1e-9  # up to ties, the most probable
            seen.append(token)
            if len(seen) > CONTEXT:
                seen = seen[-(CONTEXT // 2) :]


def check(config: GPTConfig) -> None:
    assert_causal(config)
    assert_trains(config)
    with tempfile.TemporaryDirectory() as folder:
        assert_survives_a_checkpoint(config, Tokenizer.train(["a"], 257, "byte"), Path(folder))
    assert_cache_changes_no_token(config)


@given(configs())
@settings(max_examples=15)
def test_any_configuration(config: GPTConfig) -> None:
    check(config)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(configs())
@settings(max_examples=300)
def test_three_hundred_configurations(config: GPTConfig) -> None:
    check(config)
