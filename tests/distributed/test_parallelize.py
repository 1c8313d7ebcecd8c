"""Tensor-parallel plans of the modules."""

from typing import Any

import pytest

from lit_gpt_scratch.distributed.parallelize import REPLICATED, STYLES, _declared_styles
from lit_gpt_scratch.model import GPT, GPTConfig


@pytest.mark.parametrize(
    ("settings", "unused", "n_feed_forward"),
    [
        ({}, {"experts"}, 3),
        ({"feed_forward": "moe"}, set(), 1),
        ({"feed_forward": "moe", "n_shared_experts": 1}, set(), 4),
    ],
)
def test_declared_styles_are_known_and_of_existing_modules(
    settings: dict[str, Any], unused: set[str], n_feed_forward: int
) -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, value_embeddings=True, attention_sinks=True, **settings)
    net = GPT(config, 50, 8)
    names = {module: name for name, module in net.named_modules()}
    found = {f"{names[module]}.{name}".strip("."): style for module, name, style in _declared_styles(net)}
    assert set(found.values()) == STYLES.keys() - unused | {REPLICATED}
    assert found["embedding"] == "embedding"
    assert found["head"] == "colwise_gather"
    assert found["value_tables.1"] == "colwise"
    assert found["blocks.1.attention.output"] == "rowwise"
    assert found["blocks.1.attention.key_norm"] == "replicated"
    assert found["blocks.0.attention.sinks"] == "headwise"
    assert len(found) == 4 + 2 * (7 + n_feed_forward)
