"""Captured activations equal those of the forward pass, and the network is unchanged afterwards."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.activation_hooks import (
    BlockActivations,
    CapturedActivations,
    attention_stats,
    capture_activations,
    dead_units,
    max_unit_activations,
)
from lit_gpt_scratch.model.output_heads import ClassificationHead
from tests.conftest import randomised

MANUAL = GPTConfig(n_layer=3, n_head=4, n_embd=32, attention_backend="manual")
SHAPES = {
    "default": MANUAL,
    "grouped, sandwich": replace(MANUAL, n_kv_head=2, norm_placement="sandwich", norm="layernorm"),
    "post, alibi, relu": replace(MANUAL, norm_placement="post", position="alibi", feed_forward="relu", bias=True),
    "window, caps, tied": replace(
        MANUAL, sliding_window=5, attention_softcap=9.0, logit_softcap=7.0, tied_embeddings=True, vocab_multiple=8
    ),
    "additions": replace(MANUAL, value_embeddings=True, bigram_rows=50, smear=True, residual_scalars=True, dropout=0.2),
}
IDS = torch.arange(2 * 24).view(2, 24) * 7 % 61
DOCUMENTS = torch.tensor([[0] * 10 + [1] * 14, [0] * 24])


def seen(net: GPT, documents: Tensor | None = None) -> CapturedActivations[BlockActivations]:
    return capture_activations(net, IDS, documents, lambda layer: layer)


def test_learned_sinks_have_a_distance_of_zero() -> None:
    weights = torch.tensor([[[[0.6, 0.0, 0.0], [0.3, 0.5, 0.0], [0.2, 0.1, 0.4]]]])  # (1, 1, 3, 3)
    assert attention_stats(weights).distance.item() == pytest.approx((0.3 * 1 + (0.2 * 2 + 0.1 * 1)) / 2)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "two documents"])
@pytest.mark.parametrize("shape", SHAPES)
def test_captured_activations_match_the_forward_pass(shape: str, documents: Tensor | None) -> None:
    net = randomised(SHAPES[shape])
    found = seen(net, documents)
    with torch.no_grad():
        assert torch.equal(found.output, net(IDS, documents))
        # The logit lens after the last block is the model's output, and before the first block it is not.
        last = found.layers[-1].stream
        assert torch.equal(net.logit_lens(last), found.output)
        assert not torch.equal(net.logit_lens(found.embeddings), found.output)
    for layer in found.layers:
        assert layer.weights is not None
        assert layer.weights.shape == (2, 4, 24, 24)
        torch.testing.assert_close(layer.weights.sum(-1), torch.ones(2, 4, 24))
        assert not layer.weights.triu(1).any()
        assert layer.hidden.shape == (2, 24, net.config.ffn_width)


def test_hidden_units_are_the_input_of_the_down_projection() -> None:
    net = randomised(replace(MANUAL, feed_forward="relu"))
    found = seen(net)
    read: list[Tensor] = []
    for block in net.blocks:
        block.feed_forward.register_forward_pre_hook(lambda part, given: read.append(part.input(given[0]).relu()))
    with torch.no_grad():
        net(IDS)
    for layer, expected in zip(found.layers, read, strict=True):
        assert torch.equal(layer.hidden, expected)


def test_network_is_unchanged_after_capture() -> None:
    net = randomised(replace(MANUAL, dropout=0.5)).train()
    net.blocks[1].eval()  # set by the user
    called: list[int] = []
    net.blocks[0]._compiled_call_impl = lambda *given: called.append(1) or net.blocks[0]._call_impl(*given)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    torch.manual_seed(1)
    drawn = torch.random.get_rng_state()
    seen(net)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not called  # compiled code does not call hooks
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(block.attention.recorded_weights is None for block in net.blocks)
    hooks = [(*module._forward_hooks, *module._forward_pre_hooks) for module in net.modules()]
    assert not any(hooks)
    net(IDS)
    assert called


def test_network_is_unchanged_after_a_failed_capture() -> None:
    net = randomised(MANUAL).train()
    with pytest.raises(ZeroDivisionError):
        capture_activations(net, IDS, None, lambda layer: 1 / 0)
    assert net.training
    assert all(block.attention.recorded_weights is None for block in net.blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_custom_attention_without_recorded_weights_gives_none() -> None:
    net = randomised(replace(MANUAL, attention="tests.custom_attention.AveragingAttention"))
    assert all(layer.weights is None for layer in seen(net).layers)


@pytest.mark.parametrize("lengths", [None, [24, 7], [24, 1]])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "two documents"])
def test_attention_stats_are_means_over_tokens(documents: Tensor | None, lengths: list[int] | None) -> None:
    weights = seen(randomised(MANUAL), documents).layers[1].weights
    assert weights is not None
    found = attention_stats(weights, documents, None if lengths is None else torch.tensor(lengths))
    for head in range(4):
        entropies, distances, sinks = [], [], []
        for row in range(2):
            for token in range(24 if lengths is None else lengths[row]):
                of = [0] * 24 if documents is None else documents[row].tolist()
                first = of.index(of[token])
                if token == first:
                    continue
                given = weights[row, head, token].tolist()
                entropies.append(-sum(w * math.log(w) for w in given if w > 0))
                distances.append(sum(w * (token - place) for place, w in enumerate(given)))
                sinks.append(given[first])
        for name, each in (("entropy", entropies), ("distance", distances), ("sink", sinks)):
            assert getattr(found, name)[head].item() == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_attention_stats_of_known_weights() -> None:
    """Uniform weights over n tokens have an entropy of ln n; all weight on the first token is a sink of 1."""
    T = 5
    even = torch.ones(T, T).tril()
    even = even / even.sum(-1, keepdim=True)
    first = torch.zeros(T, T)
    first[:, 0] = 1
    found = attention_stats(torch.stack((even, first))[None])
    assert found.entropy.tolist() == pytest.approx([sum(math.log(n) for n in (2, 3, 4, 5)) / 4, 0])
    assert found.distance.tolist() == pytest.approx([(0.5 + 1 + 1.5 + 2) / 4, (1 + 2 + 3 + 4) / 4])
    assert found.sink.tolist() == pytest.approx([(1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4, 1])


@pytest.mark.parametrize("kind", ["relu", "relu2", "swiglu", "gelu"])
def test_dead_units_are_found(kind: str) -> None:
    net = randomised(replace(MANUAL, feed_forward=kind, bias=True))
    killed = [3, 40, 41]
    with torch.no_grad():
        part = net.blocks[1].feed_forward
        gate = part.gate if kind == "swiglu" else part.input
        gate.weight[killed], gate.bias[killed] = 0.0, -1e4
    for number, layer in enumerate(seen(net).layers):
        silent = [unit for unit in range(layer.hidden.size(-1)) if not layer.hidden[..., unit].any()]
        assert dead_units(max_unit_activations(layer.hidden)).nonzero().flatten().tolist() == silent
        if number == 1:
            assert set(killed) <= set(silent)
        if not kind.startswith("relu"):  # with 48 tokens some ReLUs are never active by chance
            assert silent == (killed if number == 1 else [])


def test_padding_does_not_activate_units() -> None:
    hidden = torch.zeros(2, 4, 3)
    hidden[0, 1, 0], hidden[1, 3, 2] = -2.0, 5.0
    assert max_unit_activations(hidden).tolist() == [2, 0, 5]
    assert max_unit_activations(hidden, torch.tensor([4, 2])).tolist() == [2, 0, 0]
    assert dead_units(torch.zeros(3)).tolist() == [True] * 3


def test_logit_lens_of_a_classification_head() -> None:
    torch.manual_seed(0)
    net = GPT(MANUAL, 61, 24, ClassificationHead(3)).eval()
    found = seen(net)
    assert net.logit_lens(found.layers[0].stream).shape == (2, 24, 3)
