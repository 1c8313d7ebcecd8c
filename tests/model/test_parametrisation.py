"""Maximal update parametrization (mup) against table 3 of https://arxiv.org/abs/2203.03466."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.attention import AttentionLayout
from lit_gpt_scratch.model.feed_forward import FEED_FORWARDS
from lit_gpt_scratch.model.lora import LoRA, add_lora
from lit_gpt_scratch.model.weight_init import INITIALISATIONS
from lit_gpt_scratch.optim import AdamW, Muon
from lit_gpt_scratch.tasks import PPO
from tests.conftest import randomised

VOCAB, CONTEXT = 101, 16
SWITCHES: dict[str, Any] = {"value_embeddings": True, "bigram_rows": 50, "smear": True, "residual_scalars": True}
RECIPES = [AdamW(), Muon(), Muon(row_beta=0.9, bf16_state=True)]


def mup(base_width: int, **changes: Any) -> GPTConfig:
    shape = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "ffn_dim": 128}
    return GPTConfig(**(shape | changes), parametrisation="mup", mup_base_width=base_width)


def trained(config: GPTConfig, recipe: AdamW | Muon, adapters: bool = False) -> dict[str, Tensor]:
    net = GPT(config, VOCAB, CONTEXT, seed=1)
    if adapters:
        add_lora(net, LoRA(rank=2), seed=2)
    optimizer, ids = (
        recipe.build(net),
        torch.randint(VOCAB, (4, CONTEXT + 1), generator=torch.Generator().manual_seed(0)),
    )
    for _ in range(3):
        nats, count = token_cross_entropy(net(ids[:, :-1]), ids[:, 1:])
        (nats / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


@pytest.mark.parametrize("recipe", RECIPES, ids=["adamw", "muon", "normuon"])
@pytest.mark.parametrize(
    ("changes", "adapters"),
    [
        ({}, False),
        ({**SWITCHES, "position": "learned"}, False),
        ({"initialisation": "gpt2"}, True),
        *(({"tied_embeddings": True, "initialisation": scheme}, False) for scheme in INITIALISATIONS),
        *(({"qk_norm": False, "initialisation": scheme, "mup_base_head_dim": 16}, False) for scheme in INITIALISATIONS),
    ],
)
def test_mup_equals_standard_at_the_base_width(recipe: AdamW | Muon, changes: dict[str, Any], adapters: bool) -> None:
    config = mup(64, **changes)
    standard = replace(config, parametrisation="standard", mup_base_width=None, mup_base_head_dim=None)
    expected = trained(standard, recipe, adapters)
    found = trained(config, recipe, adapters)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    wider = trained(replace(config, mup_base_width=32), recipe, adapters)
    assert not all(torch.equal(wider[name], weight) for name, weight in expected.items())


RATES: dict[str, tuple[float, float, float]] = {
    "matrices": (1 / 4, 4, 1 / 4), "readouts": (1 / 4, 4, 1), "tables": (1, 1, 1 / 4), "vectors": (1, 0, 1 / 4),
}  # fmt: skip
"""Factors of the learning rate, weight decay and epsilon of AdamW at four times the base width."""


def settings(net: GPT, recipe: AdamW | Muon) -> dict[str, tuple[str, float, float, float | None]]:
    names = {parameter: name for name, parameter in net.named_parameters()}
    return {
        names[parameter]: (group["rule"], group["lr"], group["weight_decay"], group.get("eps"))
        for group in recipe.build(net).param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
def test_hyperparameters_of_each_role(tied: bool, feed_forward: str) -> None:
    net = GPT(mup(16, **SWITCHES, feed_forward=feed_forward, tied_embeddings=tied, position="learned"), VOCAB, CONTEXT)
    role = {
        "embedding.weight": "tables", "position.table.weight": "tables", "bigrams.table.weight": "tables",
        "value_tables.0.weight": "tables", "smear.gate.weight": "readouts", "head.weight": "readouts",
        "smear.share": "vectors", "norm.weight": "vectors", "blocks.1.mixing": "vectors",
        "blocks.0.attention.query_norm.weight": "vectors", "blocks.0.attention.key.weight": "matrices",
        "blocks.0.attention.output.weight": "matrices", "blocks.1.feed_forward.input.weight": "matrices",
        "blocks.1.feed_forward.output.weight": "matrices",
    }  # fmt: skip
    if tied:
        del role["head.weight"]
    if feed_forward == "moe":
        role = {name.replace("feed_forward", "feed_forward.experts"): group for name, group in role.items()}
        role["blocks.0.feed_forward.router.weight"] = "readouts"
    found = settings(net, AdamW(lr=0.1, weight_decay=0.5))
    for name, group in role.items():
        lr, decay, eps = RATES[group]
        assert found[name] == pytest.approx(("adamw", 0.1 * lr, 0.5 * decay, 1e-8 * eps)), name
    found = settings(net, Muon(lr=0.3, weight_decay=0.2, adamw_lr=0.1))
    for name, group in role.items():
        lr, _, eps = RATES[group]
        expected = ("muon", 0.3, 0.2, None) if group == "matrices" else ("adamw", 0.1 * lr, 0.0, 1e-8 * eps)
        assert found[name] == pytest.approx(expected), name


def test_lora_factors_are_a_readout_and_a_table() -> None:
    """A maps from the width to the rank, B from the rank to the width (LoRA+, https://arxiv.org/abs/2402.12354)."""
    net = GPT(mup(16), VOCAB, CONTEXT)
    add_lora(net, LoRA(rank=2))
    found = settings(net, AdamW(lr=0.1))
    assert {lr for name, (_, lr, _, _) in found.items() if name.endswith("lora_a")} == {0.1 / 4}
    assert {lr for name, (_, lr, _, _) in found.items() if name.endswith("lora_b")} == {0.1}


def test_the_value_head_of_ppo_is_a_readout() -> None:
    task = PPO(gpt=mup(16), optimizer=AdamW(lr=0.1))
    module = torch.nn.ModuleDict(
        {"net": GPT(mup(16), VOCAB, CONTEXT), "value_head": torch.nn.Linear(64, 1, bias=False)}
    )
    [group] = [group for group in task.optimizer.build(module).param_groups if group["name"] == "readouts"]
    assert any(parameter is module["value_head"].weight for parameter in group["params"])
    assert group["lr"] == 0.1 / 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", INITIALISATIONS)
def test_initial_weights_scale_with_the_width(scheme: str, tied: bool) -> None:
    """Hidden matrices with 1 / sqrt(m), untied readouts with 1 / m, and everything else not at all."""
    ratio, small = (
        8,
        mup(32, n_embd=32, n_head=2, n_kv_head=1, ffn_dim=64, initialisation=scheme, smear=True, tied_embeddings=tied),
    )
    wide = small.at_width(32 * ratio)
    narrow_net, wide_net = (GPT(config, 5000, CONTEXT, seed=0) for config in (small, wide))
    expected = {
        "embedding.weight": 1.0, "blocks.0.attention.query.weight": ratio**-0.5,
        "blocks.0.attention.value.weight": ratio**-0.5, "blocks.0.attention.output.weight": ratio**-0.5,
        "blocks.1.feed_forward.input.weight": ratio**-0.5, "blocks.1.feed_forward.output.weight": ratio**-0.5,
    }  # fmt: skip
    if not tied:
        expected["head.weight"] = 1 / ratio
    for name, factor in expected.items():
        before, after = (net.get_parameter(name).std().item() for net in (narrow_net, wide_net))
        assert after == pytest.approx(factor * before, rel=0.1), name
    assert wide_net.smear.gate.weight.std() < 2 / ratio * narrow_net.smear.gate.weight.std()  # it has few weights


@pytest.mark.parametrize("backend", ["sdpa", "manual"])
def test_attention_scores_scale_with_the_inverse_head_dimension(backend: str) -> None:
    """The base has 8 channels per head: 1 / sqrt(8) there, and sqrt(8) / 32 instead of 1 / sqrt(32) here."""
    shape = {"n_layer": 1, "n_head": 2, "qk_norm": False, "position": "none", "attention_backend": backend}
    net = randomised(mup(32, **shape, mup_base_head_dim=8), VOCAB, CONTEXT)
    layer, x = net.blocks[0].attention, torch.randn(1, CONTEXT, 64)
    q, k, v = (part(x).view(1, CONTEXT, 2, 32).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=math.sqrt(8) / 32)  # (1, 2, T, 32)
    expected = layer.output(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, net.position, AttentionLayout(torch.arange(CONTEXT), None, None)), expected)


def test_tied_logits_scale_with_the_inverse_width() -> None:
    ids = torch.randint(VOCAB, (2, CONTEXT))
    net = randomised(mup(16, tied_embeddings=True, logit_softcap=5.0), VOCAB, CONTEXT)
    logits = net.hidden_states(ids) @ net.embedding.weight.T / 4
    torch.testing.assert_close(net(ids), 5 * torch.tanh(logits / 5))


@pytest.mark.parametrize("width", [8, 24, 200])
def test_another_width_keeps_the_proportions(width: int) -> None:
    config = mup(64, n_head=16, n_kv_head=8).at_width(width)
    assert (config.n_embd, config.n_head, config.kv_heads, config.head_width) == (width, width // 4, width // 8, 4)
    assert config.ffn_width == 2 * width


def test_a_width_without_a_whole_number_of_heads_is_an_error() -> None:
    with pytest.raises(
        UserError, match="a width of 48 channels is not divisible by 32, the number of channels per key"
    ):
        mup(64).at_width(48)
