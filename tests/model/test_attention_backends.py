"""All attention backends agree with each other and with a reference in plain Python."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model import attention as module
from lit_gpt_scratch.model.attention import (
    Attention,
    AttentionLayout,
    build_attention_layout,
    causal_attention,
    manual_attention,
)
from lit_gpt_scratch.model.kv_cache import KVCache
from lit_gpt_scratch.model.positions import POSITION_ENCODINGS, PositionEncoding
from tests.conftest import randomised

T, HEADS, WIDTH = 14, 6, 16
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 9 + [2] * 2, [4] * 14])
WAYS = ("manual", "sdpa", "auto")


def shape(**changes: Any) -> GPTConfig:
    return GPTConfig(**({"n_head": HEADS, "n_embd": HEADS * WIDTH, "qk_norm": False, "position": "none"} | changes))


def order(
    config: GPTConfig, documents: bool = False, before: list[int] | None = None
) -> tuple[PositionEncoding, AttentionLayout]:
    """Position encoding and layout of ``T`` tokens in two rows, which may be packed or follow cached tokens."""
    position = POSITION_ENCODINGS[config.position](config, 64)
    ids, cache = torch.zeros(2, T, dtype=torch.int64), None
    if before is not None:
        cache = KVCache(2, 64, torch.device("cpu"), torch.float32)
        cache.lengths = list(before)
        cache.begin_forward(T)
    return position, build_attention_layout(config, position, ids, DOCUMENTS if documents else None, cache)


def drawn(dtype: torch.dtype, n_kv_head: int, keys: int = T) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, HEADS, T, WIDTH), (2, n_kv_head, keys, WIDTH), (2, n_kv_head, keys, WIDTH)]
    return [torch.randn(size, dtype=torch.float64, generator=generator).to(dtype) for size in shapes]


def values_and_gradients(backend: str, given: list[Tensor], mask: Any, softcap: float | None = None) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given]
    out = causal_attention(*leaves, mask=mask, softcap=softcap, backend=backend)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).sin().view_as(out))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("n_kv_head", [6, 2, 1])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("position", ["none", "alibi"])
@pytest.mark.parametrize(
    ("documents", "before"), [(False, None), (True, None), (False, [0, 0]), (False, [5, 5]), (False, [5, 2])]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_backends_agree_on_values_and_gradients(
    n_kv_head: int, window: int | None, position: str, documents: bool, before: list[int] | None,
    dtype: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    config = shape(n_kv_head=n_kv_head, sliding_window=window, position=position)
    mask = order(config, documents, before)[1].mask
    given = drawn(dtype, n_kv_head, T + max(before or [0]))
    manual, *others = (values_and_gradients(way, given, mask) for way in WAYS)
    assert len(manual) == 4
    for other, (a, b) in itertools.product(others, enumerate(manual)):
        assert (other[a] - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("backend", [*WAYS, "flex"])
@pytest.mark.parametrize("position", ["rotary", "alibi"])
@pytest.mark.parametrize(("window", "every"), [(None, None), (4, None), (4, 2)])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
def test_cached_logits_match_the_full_forward_pass(
    backend: str, position: str, window: int | None, every: int | None, sinks: bool, fixed: bool
) -> None:
    """Pieces of several sizes against a full forward pass with the manual backend, in float64."""
    config = GPTConfig(
        n_layer=2, n_head=4, n_kv_head=2, n_embd=32, position=position, sliding_window=window,
        sliding_window_pattern=every, rotary_local_base=50.0 if every and position == "rotary" else None,
        attention_backend=backend, attention_sinks=sinks,
    )  # fmt: skip
    net = randomised(config).double()
    exact = randomised(replace(config, attention_backend="manual")).double()
    ids = torch.randint(61, (2, 20))
    cache = KVCache(2, 24, torch.device("cpu"), torch.float64, fixed)
    with torch.no_grad():
        expected = exact(ids)
        pieces = [net.apply_head(net.hidden_states(piece, cache=cache)) for piece in ids.split([7, 1, 1, 5, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-10, atol=1e-10)


def textbook(
    q: Tensor, k: Tensor, v: Tensor, sees: Any, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attention in Python loops; ``sees(row, query, key)`` is the mask."""
    out = torch.zeros_like(q)
    for row, head, t in itertools.product(range(q.size(0)), range(q.size(1)), range(q.size(2))):
        shared = head // (q.size(1) // k.size(1))
        keys = [s for s in range(k.size(2)) if s <= t and sees(row, t, s)]
        scores = [
            sum(a * b for a, b in zip(q[row, head, t].tolist(), k[row, shared, s].tolist(), strict=True)) for s in keys
        ]
        scores = [score / math.sqrt(q.size(3)) for score in scores]
        if softcap is not None:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        total = sum(map(math.exp, scores)) + (0.0 if sinks is None else math.exp(sinks[head]))
        weights = [math.exp(score) / total for score in scores]
        for s, weight in zip(keys, weights, strict=True):
            out[row, head, t] += weight * v[row, shared, s]
    return out


@pytest.mark.parametrize("backend", ["manual", "auto"])
@pytest.mark.parametrize("softcap", [0.5, 3.0])
def test_softcap_matches_the_reference(backend: str, softcap: float) -> None:
    given = drawn(torch.float64, 2)
    found = causal_attention(*given, softcap=softcap, backend=backend)
    torch.testing.assert_close(found, textbook(*given, lambda *_: True, softcap), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(found, causal_attention(*given), rtol=1e-3)


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("window", [1, 2, 5, T, 100])
@pytest.mark.parametrize("documents", [False, True])
def test_sliding_window_matches_the_reference(backend: str, window: int, documents: bool) -> None:
    given = drawn(torch.float64, 3)
    mask = order(shape(n_kv_head=3, sliding_window=window), documents)[1].mask

    def sees(row: int, t: int, s: int) -> bool:
        alike = not documents or bool(DOCUMENTS[row, t] == DOCUMENTS[row, s])
        return alike and t - s < window

    found = causal_attention(*given, mask=mask, backend=backend)
    torch.testing.assert_close(found, textbook(*given, sees), rtol=1e-10, atol=1e-12)


def sink_logits(dtype: torch.dtype = torch.float64) -> Tensor:
    """One logit per head, from negligible to dominant."""
    return torch.linspace(-4.0, 4.0, HEADS, dtype=dtype)


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("n_kv_head", [6, 2])
def test_sinks_match_the_reference(backend: str, window: int | None, documents: bool, n_kv_head: int) -> None:
    given, sinks = drawn(torch.float64, n_kv_head), sink_logits()
    mask = order(shape(n_kv_head=n_kv_head, sliding_window=window), documents)[1].mask

    def sees(row: int, t: int, s: int) -> bool:
        return (not documents or bool(DOCUMENTS[row, t] == DOCUMENTS[row, s])) and (window is None or t - s < window)

    found = causal_attention(*given, mask=mask, sinks=sinks, backend=backend)
    torch.testing.assert_close(found, textbook(*given, sees, sinks=sinks), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, causal_attention(*given, mask=mask, backend=backend), rtol=1e-3)


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("position", ["none", "alibi"])
@pytest.mark.parametrize("before", [None, [0, 0], [5, 2]])
def test_gradients_of_sinks_match_finite_differences(backend: str, position: str, before: list[int] | None) -> None:
    mask = order(shape(n_kv_head=2, position=position), before=before)[1].mask
    given = [x.requires_grad_() for x in (*drawn(torch.float64, 2, T + max(before or [0])), sink_logits())]

    def project(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        return causal_attention(q, k, v, mask=mask, sinks=sinks, backend=backend)

    assert torch.autograd.gradcheck(project, given, fast_mode=True)


@pytest.mark.parametrize("mask", [None, torch.arange(9) < 7])
def test_single_query_with_sinks(mask: Tensor | None) -> None:
    """As in cached decoding, with and without unused slots."""
    q, k, v = drawn(torch.float64, 2)
    q, k, v = q[:, :, -1:], k[:, :, :9], v[:, :, :9]
    padded = None if mask is None else mask.view(1, 1, 1, 9)
    found = causal_attention(q, k, v, mask=padded, sinks=sink_logits())
    n = 9 if mask is None else 7
    scores = torch.einsum("bhtd,bhsd->bhts", q, k[:, :, :n].repeat_interleave(3, dim=1)) / math.sqrt(WIDTH)
    total = scores.exp().sum(-1, keepdim=True) + sink_logits().exp().view(HEADS, 1, 1)
    torch.testing.assert_close(found, scores.exp() / total @ v[:, :, :n].repeat_interleave(3, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_match_gpt_oss(dtype: torch.dtype) -> None:
    """Attention of ``transformers``, which appends the sinks to the scores."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    q, k, v = drawn(dtype, 2)
    layer = SimpleNamespace(num_key_value_groups=3, sinks=sink_logits(dtype), training=False)
    causal = torch.full((T, T), float("-inf"), dtype=dtype).triu(1)
    expected = gpt_oss.eager_attention_forward(layer, q, k, v, causal, scaling=WIDTH**-0.5)[0].transpose(1, 2)
    for backend in WAYS:
        found = causal_attention(q, k, v, sinks=layer.sinks, backend=backend)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_sinks": True}, {"sliding_window": 4}, {"attention_softcap": 1.5}, {"position": "alibi"},
     {"sliding_window": 5, "attention_softcap": 1.5, "position": "alibi", "attention_sinks": True}],
    ids=["plain", "sinks", "window", "softcap", "alibi", "all"],
)  # fmt: skip
@pytest.mark.parametrize("n_kv_head", [6, 2])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # intended
def test_flex_attention_matches_manual_attention(
    monkeypatch: pytest.MonkeyPatch, documents: bool, changes: dict[str, Any], n_kv_head: int
) -> None:
    """Uncompiled and forward only: FlexAttention has no backward pass on a CPU."""
    monkeypatch.setattr(module, "_compiled_flex_attention", lambda: flex_attention)
    config = shape(n_kv_head=n_kv_head, attention_backend="flex", **changes)
    position, blocks = order(config, documents)
    dense = order(replace(config, attention_backend="manual"), documents)[1].mask
    assert isinstance(blocks.mask, BlockMask)
    given, cap = drawn(torch.float32, n_kv_head), config.attention_softcap
    bias = position.score_bias if position.has_score_bias else None
    sinks = sink_logits(torch.float32) if config.attention_sinks else None
    with torch.no_grad():
        found = causal_attention(*given, mask=blocks.mask, softcap=cap, bias=bias, sinks=sinks, backend="flex")
        expected, weights = manual_attention(*given, mask=dense, softcap=cap, sinks=sinks)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # Manual attention with the same block mask, as used to record the weights.
        again, same = manual_attention(*given, mask=blocks.mask, softcap=cap, bias=bias, sinks=sinks)
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(same, weights, rtol=1e-5, atol=1e-6)


def test_block_mask_matches_dense_mask() -> None:
    """FlexAttention's block mask, as used on a GPU; uncompiled on a CPU, where it has no backward pass."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 40, 16), torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    ids = torch.randint(0, 5, (2, 40)).sort(dim=1).values
    blocks, dense = (
        build_attention_layout(config, PositionEncoding(config, 40), ids, ids, None)
        for config in (GPTConfig(attention_backend="flex"), GPTConfig())
    )
    assert isinstance(blocks.mask, BlockMask)
    assert torch.equal(blocks.positions, dense.positions)
    with torch.no_grad():
        found = flex_attention(q, k, v, block_mask=blocks.mask, enable_gqa=True)
        torch.testing.assert_close(found, causal_attention(q, k, v, mask=dense.mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [*WAYS, "flex"])
@pytest.mark.parametrize(
    ("changes", "documents"),
    [({}, False), ({"sliding_window": 3}, True), ({"position": "alibi"}, True), ({"attention_sinks": True}, True)],
)
def test_recorded_weights_reproduce_the_output(backend: str, changes: dict[str, Any], documents: bool) -> None:
    torch.manual_seed(0)
    config = shape(n_kv_head=2, attention_backend=backend, **changes)
    attention, (position, places) = Attention(config), order(config, documents)
    x = torch.randn(2, T, config.n_embd)
    attention.recorded_weights = []
    out = attention(x, position, places)
    (weights,) = attention.recorded_weights
    assert weights.shape == (2, HEADS, T, T)
    if config.attention_sinks:
        assert (weights.sum(-1) < 1).all()
    else:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, T))
    window = config.sliding_window or T
    for row, t, s in itertools.product(range(2), range(T), range(T)):
        seen = 0 <= t - s < window and not (documents and DOCUMENTS[row, t] != DOCUMENTS[row, s])
        assert ((weights[row, :, t, s] > 0) == seen).all()
        assert seen or not weights[row, :, t, s].any()
    values = attention.value(x).view(2, T, 2, WIDTH).repeat_interleave(3, dim=2)  # (2, T, HEADS, WIDTH)
    averaged = torch.einsum("bhts,bshd->bthd", weights, values).reshape(2, T, HEADS * WIDTH)
    torch.testing.assert_close(attention.output(averaged), out, rtol=1e-5, atol=1e-5)
    if backend != "flex":  # compared above
        attention.recorded_weights = None
        torch.testing.assert_close(attention(x, position, places), out, rtol=1e-5, atol=1e-5)


def test_weights_are_recorded_once_per_call_before_dropout() -> None:
    config = shape(dropout=0.5)
    attention, (position, places) = Attention(config).train(), order(config)
    attention.recorded_weights = []
    x = torch.randn(2, T, config.n_embd)
    first, second = attention(x, position, places), attention(x, position, places)
    assert not torch.equal(first, second)
    assert torch.equal(*attention.recorded_weights)


@pytest.mark.parametrize("backend", ["manual", "sdpa"])
def test_attention_dropout_preserves_the_mean(backend: str) -> None:
    given = [x[:1].expand(4000, -1, -1, -1) for x in drawn(torch.float32, 6)]
    torch.manual_seed(0)
    dropped = causal_attention(*given, dropout=0.3, backend=backend)
    torch.testing.assert_close(dropped.mean(0), causal_attention(*given)[0], rtol=0, atol=0.1)
    alone = dropped[:, 0, 0] / given[2][0, 0, 0]  # the first token sees only itself: its weight is kept or dropped
    assert {round(share, 4) for share in alone.flatten().tolist()} == {0.0, round(1 / 0.7, 4)}
    assert (alone == 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
