"""Position encodings against their papers, or the authors' library."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.attention import Attention, build_attention_layout
from lit_gpt_scratch.model.kv_cache import KVCache
from lit_gpt_scratch.model.positions import (
    POSITION_ENCODINGS,
    ALiBi,
    LearnedPositions,
    RotaryPositions,
    SinusoidalPositions,
    rotary_frequencies,
)

DOCUMENTS = torch.tensor([[3, 3, 3, 7, 7, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5, 5, 5, 5]])
PLACES = [[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8]]


def test_sinusoidal_matches_the_paper() -> None:
    config = GPTConfig(n_head=1, n_embd=12, position="sinusoidal")
    x = torch.randn(2, 40, 12, dtype=torch.float64)
    found = SinusoidalPositions(config, 50).embed(x, torch.arange(7, 47)) - x
    for place, i in itertools.product(range(40), range(6)):
        angle = (place + 7) / 10_000 ** (2 * i / 12)
        assert found[0, place, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert found[1, place, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_learned_positions_are_added_to_the_embeddings() -> None:
    learned = LearnedPositions(GPTConfig(n_head=1, n_embd=8, position="learned"), 9)
    x = torch.randn(2, 9, 8)
    found = learned.embed(x, torch.tensor(PLACES))
    for row, place in itertools.product(range(2), range(9)):
        torch.testing.assert_close(found[row, place], x[row, place] + learned.table.weight[PLACES[row][place]])


def authors_slopes(n: int) -> list[float]:
    """The code of ALiBi's authors (https://github.com/ofirpress/attention_with_linear_biases)."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    closest = 2 ** math.floor(math.log2(n))
    return authors_slopes(closest) + authors_slopes(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("n_head", [1, 2, 3, 4, 6, 7, 8, 12, 16, 25, 32, 40])
def test_alibi_slopes_match_the_authors_code(n_head: int) -> None:
    config = GPTConfig(n_head=n_head, n_embd=2 * n_head, position="alibi")
    assert ALiBi(config, 8).slopes.tolist() == pytest.approx(authors_slopes(n_head), rel=1e-6)


def test_alibi_slopes_for_eight_heads_match_the_paper() -> None:
    slopes = ALiBi(GPTConfig(n_head=8, n_embd=16, position="alibi"), 8).slopes
    assert slopes.tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


@pytest.mark.parametrize("backend", ["manual", "sdpa"])
def test_alibi_is_subtracted_from_the_scores(backend: str) -> None:
    config = GPTConfig(n_head=6, n_kv_head=3, n_embd=24, qk_norm=False, position="alibi", attention_backend=backend)
    attention, position = Attention(config).double(), ALiBi(config, 9)
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    found = attention(
        x, position, build_attention_layout(config, position, torch.zeros(1, 9, dtype=torch.int64), None, None)
    )
    q, k, v = attention.query(x)[0], attention.key(x)[0], attention.value(x)[0]
    expected = torch.zeros(9, 24, dtype=torch.float64)
    for t, head in itertools.product(range(9), range(6)):
        mine, theirs = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        scores = [(q[t, mine] @ k[s, theirs]).item() / 2 - authors_slopes(6)[head] * (t - s) for s in range(t + 1)]
        total = sum(math.exp(score) for score in scores)
        for s in range(t + 1):
            expected[t, mine] += math.exp(scores[s]) / total * v[s, theirs]
    torch.testing.assert_close(found[0], attention.output(expected), rtol=1e-6, atol=1e-6)  # slopes are float32


def test_rotary_angles_match_the_paper() -> None:
    config = GPTConfig(n_head=1, n_embd=8, rotary_base=100.0)
    x = torch.randn(1, 1, 5, 8, dtype=torch.float64)
    rotary = RotaryPositions(config, 5)
    turned = rotary.rotate(x.float(), rotary.cos_sin(torch.arange(5), [5]))
    for t in range(5):
        for i in range(4):
            pair = complex(x[0, 0, t, i], x[0, 0, t, i + 4]) * complex(
                math.cos(t * 100.0 ** (-2 * i / 8)), math.sin(t * 100.0 ** (-2 * i / 8))
            )
            assert turned[0, 0, t, i].item() == pytest.approx(pair.real, abs=1e-5)
            assert turned[0, 0, t, i + 4].item() == pytest.approx(pair.imag, abs=1e-5)


def test_local_blocks_have_their_own_unscaled_frequencies() -> None:
    """As in Gemma 3, whose larger models scale only the frequencies of the global blocks."""
    one = GPTConfig(n_head=1, n_embd=16, sliding_window=4, sliding_window_pattern=2)
    both = RotaryPositions(
        replace(one, rotary_base=1e6, rotary_local_base=1e4, rotary_scaling="linear", rotary_factor=8.0), 40
    )
    positions = torch.arange(40)
    for is_local, alone in (
        (True, replace(one, rotary_base=1e4)),
        (False, replace(one, rotary_base=1e6, rotary_scaling="linear", rotary_factor=8.0)),
    ):
        expected = RotaryPositions(alone, 40).cos_sin(positions, [40])
        assert all(torch.equal(a, b) for a, b in zip(both.cos_sin(positions, [40], is_local), expected, strict=True))
        assert RotaryPositions(alone, 40).cos_sin(positions, [40], is_local=True)[0].equal(expected[0])


def test_rotary_dot_products_depend_only_on_the_distance() -> None:
    rotary = RotaryPositions(GPTConfig(n_head=1, n_embd=16), 40)
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 40, 16)
    rotation = rotary.cos_sin(torch.arange(40), [40])
    scores = (rotary.rotate(q, rotation) @ rotary.rotate(k, rotation).mT)[0, 0]
    for distance in range(-5, 6):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[0].expand_as(along), atol=1e-4, rtol=1e-4)


def llamas(config: GPTConfig, **rope: Any) -> Any:
    """The config of a Llama in ``transformers`` with the same rotary positions."""
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        hidden_size=config.n_embd, num_attention_heads=config.n_head, head_dim=config.head_width,
        max_position_embeddings=64, rope_parameters={"rope_theta": config.rotary_base, **rope},
    )  # fmt: skip


SCALED = [
    ({"rotary_scaling": "linear", "rotary_factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (  # Llama 3.1
        {"rotary_scaling": "llama3", "rotary_factor": 8.0, "rotary_trained_context": 8192, "rotary_base": 5e5},
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
    ),
    (
        {"rotary_scaling": "llama3", "rotary_factor": 32.0, "rotary_trained_context": 500, "rotary_slow": 2.0,
         "rotary_fast": 9.0},
        {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 500, "low_freq_factor": 2.0,
         "high_freq_factor": 9.0},
    ),
    (  # Qwen 2.5 and 3
        {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_trained_context": 32_768, "rotary_base": 1e6},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
    ),
    (
        {"rotary_scaling": "yarn", "rotary_factor": 16.0, "rotary_trained_context": 700, "rotary_slow": 3.0,
         "rotary_fast": 20.0},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 700, "beta_slow": 3.0,
         "beta_fast": 20.0},
    ),
    (  # gpt-oss
        {"rotary_scaling": "yarn", "rotary_factor": 32.0, "rotary_trained_context": 4096, "rotary_base": 150_000.0,
         "rotary_truncate": False},
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    ),
    (  # all pairs are slowed at least in part
        {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_trained_context": 90, "rotary_truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 90, "truncate": False},
    ),
    (
        {"rotary_scaling": "yarn", "rotary_factor": 1.0, "rotary_trained_context": 700},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 700},
    ),
]  # fmt: skip


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(("changes", "rope"), SCALED)
def test_scaled_frequencies_match_transformers(changes: dict[str, Any], rope: dict[str, Any], share: float) -> None:
    pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = replace(GPTConfig(n_head=2, n_embd=256, rotary_share=share), **changes)
    theirs = llamas(config, partial_rotary_factor=share, **rope)
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, torch.device("cpu"))
    found, ours = rotary_frequencies(config, config.rotary_width)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert ours == pytest.approx(factor)


@pytest.mark.parametrize(("changes", "rope"), SCALED)
def test_scaled_rotation_matches_llama(changes: dict[str, Any], rope: dict[str, Any]) -> None:
    """Including the attention factor, which enters a score twice, by the query and by the key."""
    pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama

    config = replace(GPTConfig(n_head=2, n_embd=64), **changes)
    q, k = torch.randn(2, 2, 2, 24, 32)
    places = torch.arange(24)[None]
    cos, sin = modeling_llama.LlamaRotaryEmbedding(llamas(config, **rope))(q, places)
    rotary = RotaryPositions(config, 24)
    rotation = rotary.cos_sin(places[0], [24])
    for ours, theirs in zip((q, k), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(rotary.rotate(ours, rotation), theirs, atol=1e-5, rtol=1e-5)


@given(factor=st.floats(1.0, 64.0), base=st.floats(100.0, 1e6), half=st.integers(2, 64))
@settings(max_examples=40)
def test_ntk_scales_only_the_lowest_frequency_by_the_full_factor(factor: float, base: float, half: int) -> None:
    width = 2 * half
    config = GPTConfig(
        n_head=1, n_embd=width, rotary_base=base, rotary_scaling="ntk", rotary_factor=factor
    )  # fmt: skip
    found, sharper = rotary_frequencies(config, width)
    for i, frequency in enumerate(found.tolist()):  # b' = b s ** (d / (d - 2)), angles b' ** (-2i / d)
        assert frequency == pytest.approx((base * factor ** (width / (width - 2))) ** (-2 * i / width), rel=1e-4)
    assert found[0].item() == 1.0
    assert found[-1].item() == pytest.approx(base ** (-(width - 2) / width) / factor, rel=1e-4)
    assert sharper == 1.0


@pytest.mark.parametrize("factor", [2.0, 5.0])
def test_ntk_matches_dynamic_scaling_of_transformers(factor: float) -> None:
    """Dynamic scaling grows with the length: at twice the trained length, factor f acts as f + 1."""
    pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = GPTConfig(n_head=1, n_embd=64, rotary_scaling="ntk", rotary_factor=factor)
    theirs = llamas(config, rope_type="dynamic", factor=factor - 1)
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, torch.device("cpu"), seq_len=2 * 64)
    torch.testing.assert_close(rotary_frequencies(config, 64)[0], expected, rtol=2e-6, atol=0)


SHORT, LONG = tuple(1 + 0.05 * n for n in range(16)), tuple(1.5 + 2.0 * n for n in range(16))
BY_LENGTH = [  # changes, settings of transformers, and the original context, 64 tokens, once as the context
    (
        {"rotary_scaling": "dynamic", "rotary_factor": 4.0, "rotary_trained_context": 64},
        {"rope_type": "dynamic", "factor": 4.0},
    ),
    (
        {"rotary_scaling": "longrope", "rotary_factor": 2.0, "rotary_trained_context": 32,
         "rotary_short_factors": SHORT, "rotary_long_factors": LONG},
        {"rope_type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONG),
         "original_max_position_embeddings": 32},
    ),
    (
        {"rotary_scaling": "longrope", "rotary_factor": 1.0, "rotary_trained_context": 32,
         "rotary_short_factors": SHORT, "rotary_long_factors": LONG},
        {"rope_type": "longrope", "factor": 1.0, "short_factor": list(SHORT), "long_factor": list(LONG),
         "original_max_position_embeddings": 32},
    ),
]  # fmt: skip


@pytest.mark.parametrize("length", [1, 32, 33, 64, 65, 100, 256])
@pytest.mark.parametrize(("changes", "rope"), BY_LENGTH)
def test_frequencies_by_length_match_transformers(changes: dict[str, Any], rope: dict[str, Any], length: int) -> None:
    """Both the functions that compute the frequencies, and the rotation that chooses among them."""
    pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama import modeling_llama

    config = replace(GPTConfig(n_head=2, n_embd=64), **changes)
    theirs = llamas(config, **rope)
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, torch.device("cpu"), seq_len=length)
    found, ours = rotary_frequencies(config, 32, length)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert ours == pytest.approx(factor)
    q, k = torch.randn(2, 1, 2, length, 32)
    places = torch.arange(length)[None]
    cos, sin = modeling_llama.LlamaRotaryEmbedding(theirs)(q, places)
    rotary = RotaryPositions(config, 256)
    rotation = rotary.cos_sin(places[0], [length])
    for mine, reference in zip((q, k), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(rotary.rotate(mine, rotation), reference, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(("changes", "_"), BY_LENGTH)
def test_changes_at_the_lengths_at_which_frequencies_change(changes: dict[str, Any], _: Any) -> None:
    config = replace(GPTConfig(n_head=2, n_embd=64), **changes)
    rotary = RotaryPositions(config, 256)
    for length in range(2, 256):
        before, after = (rotary_frequencies(config, 32, n)[0] for n in (length - 1, length))
        assert rotary.changes_at(length) == (not torch.equal(before, after)), length


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_partial_rotation_matches_gpt_neox(share: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_neox import modeling_gpt_neox

    config = GPTConfig(n_head=2, n_embd=64, rotary_share=share)
    theirs = transformers.GPTNeoXConfig(
        hidden_size=64, num_attention_heads=2, rope_parameters={
            "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": share,
        },
    )  # fmt: skip
    q, k = torch.randn(2, 2, 2, 24, 32)
    places = torch.arange(24)[None]
    cos, sin = modeling_gpt_neox.GPTNeoXRotaryEmbedding(theirs)(q, places)
    rotary = RotaryPositions(config, 24)
    turned = rotary.rotate(q, rotary.cos_sin(places[0], [24]))
    torch.testing.assert_close(turned, modeling_gpt_neox.apply_rotary_pos_emb(q, k, cos, sin)[0], atol=1e-5, rtol=1e-5)
    kept = round(32 * share)
    assert torch.equal(turned[..., kept:], q[..., kept:])
    assert not torch.equal(turned[..., 1:, kept - 1], q[..., 1:, kept - 1])


def placed(config: GPTConfig, document_ids: Tensor | None, cache: KVCache | None = None) -> tuple[Tensor, Any]:
    found = build_attention_layout(
        config, POSITION_ENCODINGS[config.position](config, 16), torch.zeros_like(DOCUMENTS), document_ids, cache
    )
    return found.positions, found.cos_sin


@pytest.mark.parametrize("position", POSITION_ENCODINGS)
def test_positions_restart_with_each_document(position: str) -> None:
    config = GPTConfig(n_head=2, n_embd=16, position=position)
    assert placed(config, DOCUMENTS)[0].tolist() == PLACES
    assert placed(config, None)[0].tolist() == PLACES[1]


def test_rotations_restart_with_each_document() -> None:
    config = GPTConfig(n_head=2, n_embd=16)
    rotary = RotaryPositions(config, 16)
    for of_documents, whole in zip(placed(config, DOCUMENTS)[1], placed(config, None)[1], strict=True):
        for row, place in itertools.product(range(2), range(9)):
            assert torch.equal(of_documents[row, 0, place], whole[0, PLACES[row][place]])
    x = torch.randn(2, 2, 9, 8)
    turned = rotary.rotate(x, placed(config, DOCUMENTS)[1])
    alone = rotary.rotate(x[:1, :, 3:5], rotary.cos_sin(torch.arange(2), [2]))
    torch.testing.assert_close(turned[:1, :, 3:5], alone)


@pytest.mark.parametrize(
    ("lengths", "expected"), [([4, 4], [*range(4, 13)]), ([4, 1], [[*range(4, 13)], [*range(1, 10)]])]
)
def test_positions_continue_after_the_cache(lengths: list[int], expected: list[Any]) -> None:
    config = GPTConfig(n_head=2, n_embd=16)
    cache = KVCache(2, 16, torch.device("cpu"), torch.float32)
    cache.lengths = lengths
    cache.begin_forward(9)
    assert placed(config, None, cache)[0].tolist() == expected
