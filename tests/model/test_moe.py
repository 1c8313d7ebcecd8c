"""Mixture of experts against a loop over tokens and experts, and its losses against their equations."""

import math
import re
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.config import EXPERT_SETTINGS
from lit_gpt_scratch.model.feed_forward import FEED_FORWARDS, MixtureOfExperts
from lit_gpt_scratch.model.module_metadata import flops_per_token, inactive_parameters
from lit_gpt_scratch.model.moe import Routing, count_choices, load_balance_loss, router_z_loss

WIDTH = 8


def mixture(**settings: Any) -> MixtureOfExperts:
    """A mixture of experts in float64 with random weights and biases."""
    config = GPTConfig(n_layer=1, n_head=2, n_embd=WIDTH, feed_forward="moe", **({"ffn_dim": 6} | settings))
    module = MixtureOfExperts(config).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def swiglu(gate: Tensor, hidden: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * hidden


def clamped_swiglu(gate: Tensor, hidden: Tensor) -> Tensor:
    """As published with gpt-oss."""
    gate, hidden = gate.minimum(torch.tensor(7.0)), hidden.minimum(torch.tensor(7.0)).maximum(torch.tensor(-7.0))
    return gate / (1 + (-1.702 * gate).exp()) * (hidden + 1)


ACTIVATIONS = {"swiglu": swiglu, "clamped_swiglu": clamped_swiglu}


def apply_expert(module: nn.Module, activation: str, x: Tensor, expert: int | None = None) -> Tensor:
    """Apply one of several stacked networks, or a network, to a token."""

    def linear(name: str, x: Tensor) -> Tensor:
        layer = module.get_submodule(name)
        weight, bias = (p if p is None or expert is None else p[expert] for p in (layer.weight, layer.bias))
        return weight @ x if bias is None else weight @ x + bias

    return linear("output", ACTIVATIONS[activation](linear("gate", x), linear("input", x)))


def by_loop(module: MixtureOfExperts, x: Tensor) -> tuple[Tensor, list[list[int]]]:
    """The output for each token on its own, from the definition, and the experts of each token."""
    config, experts = module.experts.config, module.experts
    outputs, chosen = [], []
    for token in x.flatten(0, 1):
        logits = (module.router.weight @ token + (module.router.bias if config.bias else 0.0)).tolist()
        if config.router_scores == "softmax":
            scores = [math.exp(a) / sum(math.exp(b) for b in logits) for a in logits]
        else:
            scores = [1 / (1 + math.exp(-a)) for a in logits]
        biases = [0.0] * len(scores) if module.router.balance_bias is None else module.router.balance_bias.tolist()
        ranked = sorted(range(len(scores)), key=lambda e: -(scores[e] + biases[e]))[: config.experts_per_token]
        total = sum(scores[e] for e in ranked) if config.normalize_gates else 1.0
        out = torch.zeros_like(token)
        for e in ranked:
            out = out + scores[e] / total * apply_expert(experts, config.expert_activation, token, e)
        if module.shared is not None:
            out = out + apply_expert(module.shared, config.expert_activation, token)
        outputs.append(out)
        chosen.append(ranked)
    return torch.stack(outputs).view_as(x), chosen


@given(
    n_experts=st.integers(1, 6),
    k=st.integers(1, 6),
    shared=st.integers(0, 2),
    scores=st.sampled_from(["softmax", "sigmoid"]),
    normalized=st.booleans(),
    balanced=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from([*ACTIVATIONS]),
    shape=st.sampled_from([(1, 1), (2, 5), (3, 1)]),
)
@settings(max_examples=60)
def test_equals_a_loop_over_tokens_and_experts(
    n_experts: int,
    k: int,
    shared: int,
    scores: str,
    normalized: bool,
    balanced: bool,
    bias: bool,
    activation: str,
    shape: tuple[int, int],
) -> None:
    k = min(k, n_experts)
    module = mixture(
        n_experts=n_experts, experts_per_token=k, n_shared_experts=shared, router_scores=scores,
        normalize_gates=normalized and k > 1, expert_bias_rate=0.001 if balanced else None, bias=bias,
        expert_activation=activation,
    )  # fmt: skip
    x = torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, logits = module(x)
    expected, chosen = by_loop(module, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert logits.shape == (*shape, n_experts)
    routed = module.router.route(logits).experts.flatten(0, 1).tolist()
    assert [sorted(experts) for experts in routed] == [sorted(experts) for experts in chosen]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("normalized", "bias"), [(False, False), (True, True)])
def test_gradients_equal_finite_differences(scores: str, normalized: bool, bias: bool) -> None:
    module = mixture(
        n_experts=4, n_shared_experts=1, router_scores=scores, normalize_gates=normalized, expert_bias_rate=0.001,
        bias=bias, expert_activation="clamped_swiglu" if bias else "swiglu",
    )  # fmt: skip
    x = torch.randn(1, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    names = [name for name, _ in module.named_parameters()]
    assert len(names) == (14 if bias else 7)

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, weights, strict=True))
        out, logits = torch.func.functional_call(module, given, (x,))
        return out, load_balance_loss(module.router.route(logits)) + router_z_loss(logits)

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))
    module(x)[0].sum().backward()
    assert module.router.weight.grad.abs().sum() > 0


def test_router_runs_in_float32_under_autocast() -> None:
    module = mixture().float()
    x = torch.randn(2, 5, WIDTH)
    expected = module.router(x)
    with torch.autocast("cpu", torch.bfloat16):
        _, logits = module(x)
    assert torch.equal(logits, expected)
    assert module.bfloat16()(x.bfloat16())[1].dtype == torch.float32


def test_gates_are_the_softmax_of_the_chosen_logits() -> None:
    """As in gpt-oss; they equal the normalized softmax scores of all experts."""
    module = mixture(n_experts=6, experts_per_token=3, bias=True)
    logits = module.router(3 * torch.randn(50, WIDTH, dtype=torch.float64))
    routing = module.router.route(logits)
    top = logits.topk(3)
    assert torch.equal(routing.experts, top.indices)
    torch.testing.assert_close(routing.gates, top.values.softmax(-1), rtol=1e-13, atol=0)


def routing(probabilities: Tensor, k: int) -> Routing:
    return Routing(probabilities, probabilities.topk(k).indices, torch.zeros(()))


def test_load_balance_loss_by_hand() -> None:
    """DeepSeek-V3, equations 17 to 20: two sequences of two tokens, three experts, one per token."""
    scores = torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.2, 0.2]], [[0.2, 0.7, 0.1], [0.1, 0.1, 0.8]]])
    first = 3 / (1 * 2) * (2 * (0.5 + 0.6) / 2)  # both tokens choose expert 0
    second = 3 / (1 * 2) * (1 * (0.7 + 0.1) / 2 + 1 * (0.1 + 0.8) / 2)
    assert load_balance_loss(routing(scores, 1)).item() == pytest.approx((first + second) / 2)
    assert load_balance_loss(routing(scores * 7, 1)).item() == pytest.approx((first + second) / 2)  # normalized


def test_load_balance_loss_has_the_stated_bounds() -> None:
    uniform = torch.full((1, 4, 4), 0.25)
    rotated = torch.tensor([[[0, 1], [1, 2], [2, 3], [3, 0]]])
    assert load_balance_loss(Routing(uniform, rotated, uniform)).item() == pytest.approx(1.0)
    certain = torch.zeros(1, 4, 4)
    certain[..., :2] = 0.5
    assert load_balance_loss(routing(certain, 2)).item() == pytest.approx(4 / 2)


def test_losses_do_not_depend_on_how_sequences_are_batched() -> None:
    module = mixture(n_experts=5)
    x = torch.randn(4, 6, WIDTH, dtype=torch.float64)
    logits = module.router(x)
    rows = [load_balance_loss(module.router.route(row[None])) for row in logits]
    assert load_balance_loss(module.router.route(logits)).item() == pytest.approx(torch.stack(rows).mean().item())
    z = torch.tensor([math.log(sum(math.exp(a) for a in row)) ** 2 for row in logits.flatten(0, 1).tolist()]).mean()
    assert router_z_loss(logits).item() == pytest.approx(z.item(), rel=1e-6)


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3).filter(any))
@settings(max_examples=20)
def test_losses_and_counts_ignore_padding(lengths: list[int]) -> None:
    """They are those of the sequences without it; sequences without tokens do not count."""
    module = mixture(n_experts=5)
    x = torch.randn(len(lengths), 6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    logits = module.router(x)
    is_token = torch.arange(6) < torch.tensor(lengths)[:, None]
    routing = module.router.route(logits)
    rows = [row[None, :length] for row, length in zip(logits, lengths, strict=True) if length]
    expected = torch.stack([load_balance_loss(module.router.route(row)) for row in rows]).mean()
    torch.testing.assert_close(load_balance_loss(routing, is_token), expected)
    tokens = torch.cat([row[0] for row in rows])[None]
    torch.testing.assert_close(router_z_loss(logits, is_token), router_z_loss(tokens))
    counts = count_choices(routing.experts, 5, is_token)
    assert counts.sum(1).tolist() == [2 * length for length in lengths]
    chosen = module.router.route(tokens).experts
    assert counts.sum(0).tolist() == torch.bincount(chosen.flatten(), minlength=5).tolist()


def test_bias_is_not_rounded_by_16_bit_weights() -> None:
    """In bfloat16, adding 0.001 to 0.5 changes nothing."""
    module = mixture(expert_bias_rate=0.001).float().bfloat16()
    assert module.router.weight.dtype == torch.bfloat16
    assert module.router.balance_bias.dtype == torch.float32
    module.router.balance_bias.fill_(0.5)
    state = module.state_dict()
    state["router.balance_bias"] += 0.001
    module.load_state_dict(state)
    assert module.router.balance_bias[0].item() == pytest.approx(0.501)
    assert module.double().router.balance_bias.dtype == torch.float64


def test_flops_are_those_of_the_active_parameters() -> None:
    """All experts have the same size: a token uses 2 of 5, the shared expert and the router."""
    module = mixture(n_experts=5, n_shared_experts=1)
    expert = 3 * 6 * WIDTH
    assert inactive_parameters(module) == 3 * expert
    assert flops_per_token(module, 100) == 2 * (3 * expert + 5 * WIDTH)
    biased = mixture(n_experts=5, n_shared_experts=1, bias=True)
    assert inactive_parameters(biased) == 3 * (expert + 2 * 6 + WIDTH)
    assert flops_per_token(biased, 100) == flops_per_token(module, 100)  # additions do not count
    net = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=WIDTH, feed_forward="moe", ffn_dim=6, n_experts=5), 20, 8)
    assert inactive_parameters(net) == 3 * 3 * expert


def test_default_width_keeps_the_active_parameters_of_swiglu() -> None:
    sizes = {
        settings: 3 * n * 192 * GPTConfig(feed_forward="moe", experts_per_token=k, n_shared_experts=shared).ffn_width
        for settings, n, k, shared in (("2", 2, 2, 0), ("4 and 1 shared", 5, 4, 1))
    }
    dense = 3 * 192 * GPTConfig().ffn_width
    assert all(size == pytest.approx(dense, rel=0.07) for size in sizes.values())


@pytest.mark.parametrize("checkpointing", [False, True, "keep_matmuls"])
def test_each_forward_pass_with_gradients_records_the_router_logits_of_each_block(checkpointing: Any) -> None:
    net = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=16, feed_forward="moe", initialisation="normal"), 20, 8)
    net.activation_checkpointing = checkpointing
    ids = torch.randint(20, (2, 8))
    net(ids)
    net.recorded_router_logits = []
    with torch.no_grad():
        net(ids)  # not recorded
    loss = net(ids).sum() + net(ids).sum()
    recorded = list(net.recorded_router_logits)
    (loss + sum(logits.square().mean() for logits in recorded)).backward()  # recomputes the blocks
    assert [tuple(logits.shape) for logits in net.recorded_router_logits] == [(2, 8, 8)] * 6
    assert all(torch.equal(a, b) for a, b in zip(net.recorded_router_logits[:3], recorded[3:], strict=True))
    assert all(block.feed_forward.router.weight.grad.abs().sum() > 0 for block in net.blocks)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_record_the_same_logits_and_gradients(checkpointing: bool) -> None:
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, feed_forward="moe", initialisation="normal")
    ids, gradients = torch.randint(20, (2, 8)), []
    for compiled in (False, True):
        net = GPT(config, 20, 8, seed=1)
        net.activation_checkpointing = checkpointing
        if compiled:
            net.blocks[0].compile(backend="aot_eager", fullgraph=True, dynamic=False)
        net.recorded_router_logits = []
        (net(ids).square().sum() + net.recorded_router_logits[0].square().sum()).backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_experts": 4, "experts_per_token": 5}, "experts_per_token is 5, but model.gpt.n_experts is 4; lower"),
        ({"experts_per_token": 1}, "experts_per_token is 1, for which model.gpt.normalize_gates makes every gate 1"),
        ({"load_balance_loss": -0.1}, "load_balance_loss is -0.1; it must be 0 or more"),
        ({"router_z_loss": math.inf}, "router_z_loss is inf; it must be 0 or more, and finite"),
        ({"expert_bias_rate": math.nan}, "expert_bias_rate is nan; it must be 0 or more"),
        ({"router_scores": "relu"}, "router_scores is relu; it must be one of softmax, sigmoid"),
        ({"expert_activation": "relu"}, "expert_activation is relu; it must be one of swiglu, geglu, clamped_swiglu"),
        ({"n_experts": 0}, "n_experts is 0; it must be positive"),
        ({"n_experts": 10**9}, "n_experts is 1000000000; it must be at most 16384"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1; it must be 0 or more"),
    ],
)
def test_invalid_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPTConfig(feed_forward="moe", **settings)


SETTINGS = {
    "n_experts": 64, "experts_per_token": 3, "n_shared_experts": 1, "expert_activation": "geglu",
    "router_scores": "sigmoid", "normalize_gates": False, "load_balance_loss": 0.0, "router_z_loss": 0.001,
    "expert_bias_rate": 0.001,
}  # fmt: skip
"""A value other than the default of each setting."""


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("feed_forward", [name for name in FEED_FORWARDS if name != "moe"])
def test_settings_without_effect_are_an_error(feed_forward: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.gpt\.{name} is .*, but model\.gpt\.feed_forward is {feed_forward};"):
        GPTConfig(feed_forward=feed_forward, **{name: SETTINGS[name]})
    GPTConfig(feed_forward="moe", **{name: SETTINGS[name]})
    GPTConfig(feed_forward="my_file.MyExperts", **{name: SETTINGS[name]})  # may use the settings, too


def test_all_settings_of_experts_are_tested() -> None:
    named = {field.name for field in fields(GPTConfig) if re.search("expert|router|gates|load_balance", field.name)}
    assert named == SETTINGS.keys() == set(EXPERT_SETTINGS)
