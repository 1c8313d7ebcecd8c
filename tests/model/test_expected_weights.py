"""Expected names and shapes of weights are those of the model, though only one of its blocks is built."""

from typing import Any

import pytest
import torch

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model import expected_weights as module
from lit_gpt_scratch.model.expected_weights import expected_weights
from lit_gpt_scratch.model.lora import LoRA, add_lora

CONFIGS = [
    GPTConfig(n_layer=3, n_head=2, n_embd=32),
    GPTConfig(n_layer=2, n_head=2, n_embd=32, norm="layernorm", bias=True, position="learned", tied_embeddings=True),
    GPTConfig(n_layer=2, n_head=2, n_embd=32, value_embeddings=True, bigram_rows=8, smear=True),
]
ADAPTERS = [None, LoRA(rank=2), LoRA(rank=2, pattern="blocks.1.*query"), LoRA(rank=2, pattern="head|1.attention")]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("lora", ADAPTERS)
def test_same_as_the_model(config: GPTConfig, lora: LoRA | None) -> None:
    net = GPT(config, 40, 16)
    if lora is not None:
        add_lora(net, lora)
    state = net.state_dict()
    expected = expected_weights(state, config, 40, 16, lora=lora)
    assert {name: (w.shape, w.dtype) for name, w in expected.items()} == {
        name: (w.shape, w.dtype) for name, w in state.items()
    }
    assert all(weight.is_meta for weight in expected.values())


def test_pattern_that_matches_nothing() -> None:
    with pytest.raises(UserError, match="does not match any linear layer"):
        expected_weights(GPT(CONFIGS[0], 40, 16).state_dict(), CONFIGS[0], 40, 16, lora=LoRA(pattern="blocks.7"))


@pytest.mark.parametrize("name", ["{}.weight", "blocks.0.{}", "model.layers.0.w{}.weight"])
def test_layers_are_counted_by_their_index(name: str) -> None:
    found = {name.format(number): torch.empty(0) for number in range(100)}
    n_layers = 100 if name.startswith("{}") else 1
    with pytest.raises(UserError, match=f"weights for only {n_layers} layer"):
        expected_weights(found, GPTConfig(n_layer=n_layers + 1), 40, 16)


def test_many_empty_tensors_do_not_build_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def build(config: GPTConfig, *rest: Any) -> GPT:
        built.append(config.n_layer)
        return GPT(config, *rest)

    monkeypatch.setattr(module, "GPT", build)
    found = {f"blocks.{layer}.": torch.empty(0) for layer in range(10_000)}
    expected = expected_weights(found, GPTConfig(n_layer=10_000, n_head=2, n_embd=32), 40, 16)
    assert built == [1]
    assert len({name.split(".")[1] for name in expected if name.startswith("blocks.")}) == 10_000
