"""The attention module against the softmax formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.attention import Attention, AttentionLayout, build_attention_layout
from lit_gpt_scratch.model.positions import PositionEncoding


def causal_layout(config: GPTConfig, tokens: int) -> tuple[PositionEncoding, AttentionLayout]:
    """No position encoding, causal."""
    position = PositionEncoding(config, tokens)
    return position, build_attention_layout(config, position, torch.zeros(1, tokens, dtype=torch.int64), None, None)


def rms_normed(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


@pytest.mark.parametrize("norms", ["none", "per head", "joint"])
@pytest.mark.parametrize("n_kv_head", [6, 3, 2, 1])
def test_attention_matches_the_softmax_formula(n_kv_head: int, norms: str) -> None:
    joint = norms == "joint"
    config = GPTConfig(
        n_head=6, n_kv_head=n_kv_head, n_embd=24, qk_norm=norms != "none", qk_norm_joint=joint, qkv_bias=joint
    )
    attention = Attention(config)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    x = torch.randn(2, 7, 24)
    queries, keys, values = attention.query(x), attention.key(x), attention.value(x)
    if joint:
        queries = rms_normed(queries, attention.query_norm.weight)
        keys = rms_normed(keys, attention.key_norm.weight)
    expected = torch.zeros(2, 7, 24)
    for head in range(6):
        mine, shared = slice(4 * head, 4 * head + 4), head // (6 // n_kv_head)
        theirs = slice(4 * shared, 4 * shared + 4)
        q, k, v = queries[..., mine], keys[..., theirs], values[..., theirs]
        if norms == "per head":
            q, k = rms_normed(q, attention.query_norm.weight), rms_normed(k, attention.key_norm.weight)
        for t in range(7):
            weights = torch.softmax(q[:, t, None] @ k[:, : t + 1].mT / math.sqrt(4), dim=-1)
            expected[:, t] += ((weights @ v[:, : t + 1]).squeeze(1)) @ attention.output.weight[:, mine].T
    torch.testing.assert_close(attention(x, *causal_layout(config, 7)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("every", "skipped"), [(None, []), (1, [0, 1, 2, 3, 4]), (2, [1, 3]), (4, [3]), (6, [])])
def test_some_blocks_do_not_rotate(every: int | None, skipped: list[int]) -> None:
    net = GPT(GPTConfig(n_layer=5, n_head=2, n_embd=16, rotary_skip_every=every), 20, 8)
    found = []
    for layer, block in enumerate(net.blocks):

        def record(module: Attention, arguments: tuple[Any, ...], layer: int = layer) -> None:
            if arguments[2].cos_sin is None:
                found.append(layer)

        block.attention.register_forward_pre_hook(record)
    net(torch.zeros(1, 8, dtype=torch.int64))
    assert found == skipped


def test_value_embeddings_are_added_to_the_values() -> None:
    config = GPTConfig(n_head=2, n_embd=8)
    attention, order = Attention(config), causal_layout(config, 5)
    x, added = torch.randn(1, 5, 8), torch.randn(8)
    without, shifted = attention(x, *order), attention(x, *order, added.expand(1, 5, 8))
    # Attention averages values: a vector added to all values is added to the average.
    torch.testing.assert_close(shifted - without, (added @ attention.output.weight.T).expand(1, 5, 8))
