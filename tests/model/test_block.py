"""Block, norms and feed-forward network against their equations."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.attention import AttentionLayout, build_attention_layout
from lit_gpt_scratch.model.feed_forward import FEED_FORWARDS
from lit_gpt_scratch.model.gpt import Block
from lit_gpt_scratch.model.module_metadata import inactive_parameters
from lit_gpt_scratch.model.norms import NORM_PLACEMENTS, NORMS, build_norm
from lit_gpt_scratch.model.positions import PositionEncoding

T, WIDTH = 6, 16


def shape(**changes: Any) -> GPTConfig:
    return GPTConfig(**({"n_layer": 2, "n_head": 2, "n_embd": WIDTH, "position": "none"} | changes))


def drawn(module: nn.Module) -> nn.Module:
    """In float64, with random weights and gains."""
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.5)
    return module


def order(config: GPTConfig) -> tuple[PositionEncoding, AttentionLayout]:
    position = PositionEncoding(config, T)
    return position, build_attention_layout(config, position, torch.zeros(2, T, dtype=torch.int64), None, None)


def normed(config: GPTConfig, norm: nn.Module, x: Tensor) -> Tensor:
    """The norm by the equations of its paper."""
    weights = dict(norm.named_parameters())
    if config.norm != "layernorm":
        gain = weights["weight"] + (config.norm == "zero_centered_rmsnorm")
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * gain
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights["weight"] + weights.get(
        "bias", 0.0
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_norm_matches_its_equation(norm: str, bias: bool, eps: float) -> None:
    config = shape(norm=norm, bias=bias, norm_eps=eps)
    module = drawn(build_norm(config.norm, config.n_embd, config.norm_eps, config.bias))
    assert {name for name, _ in module.named_parameters()} == (
        {"weight", "bias"} if bias and norm == "layernorm" else {"weight"}
    )
    x = 2 + torch.randn(3, T, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(module(x), normed(config, module, x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", NORM_PLACEMENTS)
def test_block_matches_its_equations(placement: str, norm: str, bias: bool) -> None:
    config = shape(norm=norm, norm_placement=placement, bias=bias)
    block = drawn(Block(config))
    x = torch.randn(2, T, WIDTH, dtype=torch.float64)

    def attend(x: Tensor) -> Tensor:
        return block.attention(x, *order(config))

    first, second = block.attention_norm, block.feed_forward_norm
    if placement == "pre":  # GPT-2: x + f(norm(x))
        h = x + attend(normed(config, first, x))
        expected = h + block.feed_forward(normed(config, second, h))
    elif placement == "post":  # the original Transformer: norm(x + f(x))
        h = normed(config, first, x + attend(x))
        expected = normed(config, second, h + block.feed_forward(h))
    elif placement == "output":  # OLMo 2: x + norm(f(x))
        h = x + normed(config, block.attention_end, attend(x))
        expected = h + normed(config, block.feed_forward_end, block.feed_forward(h))
    else:  # Gemma 2: x + norm(f(norm(x)))
        h = x + normed(config, block.attention_end, attend(normed(config, first, x)))
        expected = h + normed(config, block.feed_forward_end, block.feed_forward(normed(config, second, h)))
    torch.testing.assert_close(block(x, x, *order(config))[0], expected)


@pytest.mark.parametrize(("placement", "norms"), [("pre", 5), ("post", 4), ("output", 5), ("sandwich", 9)])
def test_number_of_norms_by_placement(placement: str, norms: int) -> None:
    """Two or four per block, and one before the head, except with post-norm."""
    net = GPT(shape(norm_placement=placement, norm="layernorm"), 61, T)
    assert sum(isinstance(module, nn.LayerNorm) for module in net.modules()) == norms


@pytest.mark.parametrize("bias", [False, True])
def test_every_linear_layer_except_the_head_has_a_bias(bias: bool) -> None:
    for name, module in GPT(shape(bias=bias), 61, T).named_modules():
        if isinstance(module, nn.Linear):
            assert (module.bias is not None) == (bias and name != "head"), name


def test_residual_scalars_mix_the_stream_with_the_embeddings() -> None:
    config = shape()
    block, without = Block(shape(residual_scalars=True)), Block(config)
    x, start = torch.randn(2, 2, T, WIDTH)
    without.load_state_dict({name: value for name, value in block.state_dict().items() if name != "mixing"})
    torch.testing.assert_close(
        block(x, start, *order(config))[0], without(x, start, *order(config))[0]
    )  # at initialisation
    assert block.mixing is not None
    with torch.no_grad():
        block.mixing.copy_(torch.tensor([0.5, 2.0]))
    mixed = 0.5 * x + 2.0 * start
    torch.testing.assert_close(block(x, start, *order(config))[0], without(mixed, mixed, *order(config))[0])


def test_dropout_applies_to_residual_branches_only() -> None:
    config = shape(dropout=0.5)
    block, x = drawn(Block(config)).train(), torch.randn(2, T, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        block.feed_forward.output.weight.zero_()
        added = block(x, x, *order(config))[0] - x
    share = (added == 0).double().mean().item()
    assert 0.35 < share < 0.65


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


EQUATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda hidden, _: hidden * (hidden > 0),
    "relu2": lambda hidden, _: (hidden * (hidden > 0)) ** 2,
    "gelu": lambda hidden, _: gelu(hidden),
    "gelu_exact": lambda hidden, _: hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2,
    "swiglu": lambda hidden, gate: silu(gate) * hidden,
    "geglu": lambda hidden, gate: gelu(gate) * hidden,
    "clamped_swiglu": lambda hidden, gate: (
        torch.where(gate < 7, gate, 7.0)
        / (1 + torch.exp(-1.702 * torch.where(gate < 7, gate, 7.0)))
        * (torch.where(hidden.abs() < 7, hidden, 7 * hidden.sign()) + 1)
    ),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", EQUATIONS)
def test_feed_forward_matches_its_equation(kind: str, bias: bool) -> None:
    module = drawn(FEED_FORWARDS[kind](shape(feed_forward=kind, ffn_dim=24, bias=bias)))
    x = 20 * torch.randn(2, 3, WIDTH, dtype=torch.float64)  # such that some channels exceed all bounds

    def linear(name: str, x: Tensor) -> Tensor:
        weights = dict(module.named_parameters())
        product = torch.einsum("oi,bti->bto", weights[f"{name}.weight"], x)
        return product + weights[f"{name}.bias"] if bias else product

    gate = linear("gate", x) if "glu" in kind else x
    hidden = EQUATIONS[kind](linear("input", x), gate)
    assert FEED_FORWARDS.keys() == EQUATIONS.keys() | {"moe"}  # see test_moe.py
    assert hidden.shape == (2, 3, 24)
    torch.testing.assert_close(module(x), linear("output", hidden))


def test_feed_forward_kinds_have_equal_parameter_counts() -> None:
    sizes = {
        kind: sum(p.numel() for p in module.parameters() if p.ndim > 1) - inactive_parameters(module)
        for kind, module in (
            (kind, FEED_FORWARDS[kind](shape(n_embd=192, feed_forward=kind))) for kind in FEED_FORWARDS
        )
    }
    assert max(sizes.values()) / min(sizes.values()) < 1.02, sizes
