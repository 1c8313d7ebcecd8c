"""The attention module against the softmax formula."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model import attention as module
from lit_gpt_scratch.model.attention import Attention, AttentionLayout, build_attention_layout
from lit_gpt_scratch.model.positions import PositionEncoding
from tests.conftest import randomised


def causal_layout(config: GPTConfig, tokens: int) -> tuple[PositionEncoding, AttentionLayout]:
    """No position encoding, causal."""
    position = PositionEncoding(config, tokens)
    return position, build_attention_layout(config, position, torch.zeros(1, tokens, dtype=torch.int64), None, None)


@pytest.mark.parametrize("backend", ["manual", "sdpa"])
def test_attention_scale_replaces_the_default(backend: str) -> None:
    """As if the queries were larger, as ``query_pre_attn_scalar`` in Gemma 2 (144 with heads of 128 channels)."""
    config = GPTConfig(n_head=2, n_embd=16, attention_backend=backend, qk_norm=False, position="none")
    attention, x = Attention(config).double(), torch.randn(1, 7, 16, dtype=torch.float64)
    scaled = Attention(replace(config, attention_scale=9.0**-0.5)).double()
    scaled.load_state_dict(attention.state_dict())
    with torch.no_grad():
        assert not torch.allclose(scaled(x, *causal_layout(config, 7)), attention(x, *causal_layout(config, 7)))
        attention.query.weight *= (8 / 9) ** 0.5
    torch.testing.assert_close(scaled(x, *causal_layout(config, 7)), attention(x, *causal_layout(config, 7)))


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


@pytest.mark.parametrize(
    ("every", "are_local"),
    [(None, [True] * 7), (2, [True, False] * 3 + [True]), (6, [True] * 5 + [False, True]), (7, [True] * 6 + [False])],
)
@pytest.mark.parametrize("documents", [False, True])
def test_local_blocks_share_the_window_and_global_blocks_have_none(
    every: int | None, are_local: list[bool], documents: bool
) -> None:
    """Gemma 3 has a global block after five local blocks; Gemma 2 and gpt-oss alternate, starting with a local one."""
    config = GPTConfig(n_layer=7, n_head=2, n_embd=16, sliding_window=3, sliding_window_pattern=every)
    net, ids = GPT(config, 20, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    found: list[AttentionLayout] = []
    for block in net.blocks:
        block.attention.register_forward_pre_hook(lambda _, arguments: found.append(arguments[2]))
    net(torch.zeros_like(ids), ids if documents else None)
    assert [config.is_local(layer) for layer in range(7)] == are_local
    masks: dict[bool, Any] = {}
    for layout, is_local in zip(found, are_local, strict=True):
        assert layout.mask is masks.setdefault(is_local, layout.mask)  # built once
    for is_local, mask in masks.items():
        if mask is None:
            assert not is_local
            assert not documents
            continue
        for t, s in itertools.product(range(8), range(8)):
            seen = 0 <= t - s < (3 if is_local else 8) and not (documents and ids[0, t] != ids[0, s])
            assert mask[0, 0, t, s] == seen


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # intended
def test_patterns_have_the_same_logits_with_every_backend(monkeypatch: pytest.MonkeyPatch, documents: bool) -> None:
    monkeypatch.setattr(module, "_compiled_flex_attention", lambda: flex_attention)
    config = GPTConfig(
        n_layer=3, n_head=2, n_embd=32, sliding_window=5, sliding_window_pattern=2, rotary_local_base=50.0
    )
    ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))
    document_ids = torch.tensor([[0] * 9 + [1] * 15, [3] * 24]) if documents else None
    logits = {}
    for backend in ("manual", "sdpa", "auto", "flex"):
        with torch.no_grad():
            logits[backend] = randomised(replace(config, attention_backend=backend))(ids, document_ids)
        torch.testing.assert_close(logits[backend], logits["manual"], rtol=1e-4, atol=1e-4)
    for changes in ({"sliding_window_pattern": None, "rotary_local_base": None}, {"rotary_local_base": None}):
        with torch.no_grad():  # otherwise the test could not fail
            assert not torch.allclose(randomised(replace(config, **changes))(ids, document_ids), logits["auto"], 1e-2)


def test_value_embeddings_are_added_to_the_values() -> None:
    config = GPTConfig(n_head=2, n_embd=8)
    attention, order = Attention(config), causal_layout(config, 5)
    x, added = torch.randn(1, 5, 8), torch.randn(8)
    without, shifted = attention(x, *order), attention(x, *order, added.expand(1, 5, 8))
    # Attention averages values: a vector added to all values is added to the average.
    torch.testing.assert_close(shifted - without, (added @ attention.output.weight.T).expand(1, 5, 8))
