"""The attention module against the softmax formula."""

import math

import pytest
import torch

from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.attention import Attention, AttentionLayout, build_attention_layout
from lit_gpt_scratch.model.positions import PositionEncoding


def causal_layout(config: GPTConfig, tokens: int) -> tuple[PositionEncoding, AttentionLayout]:
    """No position encoding, causal."""
    position = PositionEncoding(config, tokens)
    return position, build_attention_layout(config, position, torch.zeros(1, tokens, dtype=torch.int64), None, None)


@pytest.mark.parametrize("n_kv_head", [6, 3, 2, 1])
def test_attention_matches_the_softmax_formula(n_kv_head: int) -> None:
    config = GPTConfig(n_head=6, n_kv_head=n_kv_head, n_embd=24, qk_norm=False)
    attention = Attention(config)
    x = torch.randn(2, 7, 24)
    expected = torch.zeros(2, 7, 24)
    for head in range(6):
        mine, shared = slice(4 * head, 4 * head + 4), head // (6 // n_kv_head)
        theirs = slice(4 * shared, 4 * shared + 4)
        q = x @ attention.query.weight[mine].T
        k, v = x @ attention.key.weight[theirs].T, x @ attention.value.weight[theirs].T
        for t in range(7):
            weights = torch.softmax(q[:, t, None] @ k[:, : t + 1].mT / math.sqrt(4), dim=-1)
            expected[:, t] += ((weights @ v[:, : t + 1]).squeeze(1)) @ attention.output.weight[:, mine].T
    torch.testing.assert_close(attention(x, *causal_layout(config, 7)), expected, atol=1e-5, rtol=1e-5)


def test_value_embeddings_are_added_to_the_values() -> None:
    config = GPTConfig(n_head=2, n_embd=8)
    attention, order = Attention(config), causal_layout(config, 5)
    x, added = torch.randn(1, 5, 8), torch.randn(8)
    without, shifted = attention(x, *order), attention(x, *order, added.expand(1, 5, 8))
    # Attention averages values: a vector added to all values is added to the average.
    torch.testing.assert_close(shifted - without, (added @ attention.output.weight.T).expand(1, 5, 8))
