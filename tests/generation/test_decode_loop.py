"""The cached generation loop against a loop without a cache."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation import decode_loop
from lit_gpt_scratch.generation.decode_loop import generate, prefill
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.attention import Attention, AttentionLayout
from lit_gpt_scratch.model.kv_cache import KVCache
from tests.conftest import TINY, randomised

LOOKS_BACK = replace(TINY, smear=True, bigram_rows=50, value_embeddings=True, residual_scalars=True, n_kv_head=1)
ALIBI = replace(TINY, position="alibi", sliding_window=7, attention_softcap=5.0)
GREEDY = Sampling(temperature=0.0)


def texts(model: GPT, prompts: list[list[int]], n: int, sampling: Sampling = GREEDY, **more: object) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    settings = {"seeds": list(range(len(prompts))), "end_of_text": -1} | more
    for row, token in generate(model, prompts, n, sampling, **settings):  # type: ignore[arg-type]  # as given
        if token is not None:
            found[row].append(token)
    return found


@torch.no_grad()
def generate_uncached(model: GPT, prompt: list[int], n: int) -> list[int]:
    """Recompute the whole text for each token; a full context continues from its last half."""
    seen, found = list(prompt), []
    for _ in range(n):
        found.append(int(model(torch.tensor([seen]))[0, -1].argmax()))
        seen.append(found[-1])
        if len(seen) > model.block_size:
            seen = seen[-(model.block_size // 2) :]
    return found


GEMMA3 = replace(TINY, sliding_window=7, sliding_window_pattern=2, rotary_local_base=50.0, norm_placement="sandwich")
GPT_OSS = replace(
    TINY, sliding_window=7, sliding_window_pattern=2, attention_sinks=True, bias=True, feed_forward="moe",
    expert_activation="clamped_swiglu", rotary_scaling="yarn", rotary_factor=2.0, rotary_trained_context=12,
    rotary_truncate=False,
)  # fmt: skip
OLMO2 = replace(TINY, n_layer=3, qk_norm_joint=True, norm_placement="output", qkv_bias=True, rotary_skip_every=2)


EXPERTS = replace(TINY, feed_forward="moe", n_shared_experts=1, expert_bias_rate=0.1)
DYNAMIC = replace(
    LOOKS_BACK, n_kv_head=2, rotary_scaling="dynamic", rotary_factor=2.0, rotary_trained_context=13
)  # fmt: skip
LONGROPE = replace(
    DYNAMIC, rotary_scaling="longrope", rotary_short_factors=(1.0,) * 8, rotary_long_factors=(1.5, 3.0) * 4
)  # fmt: skip
LATENT = replace(TINY, attention="latent", latent_kv_rank=40, latent_query_rank=12, attention_sinks=True)
CACHED = {
    "plain": TINY, "looks-back": LOOKS_BACK, "alibi": ALIBI, "olmo2": OLMO2, "experts": EXPERTS, "latent": LATENT,
    "dynamic": DYNAMIC, "longrope": LONGROPE, "gemma3": GEMMA3, "gpt-oss": GPT_OSS,
}  # fmt: skip


@pytest.mark.parametrize("config", CACHED.values(), ids=CACHED)
def test_cached_and_uncached_tokens_are_equal(config: GPTConfig) -> None:
    """Prompts of different lengths, one that fills the context, and texts that exceed it more than once."""
    model = randomised(config).double()
    prompts = [[3, 1, 4], [1] * 11, [2], list(range(24))]
    assert texts(model, prompts, 60) == [generate_uncached(model, prompt, 60) for prompt in prompts]


@pytest.mark.parametrize("context", [2, 3, 4, 5])
def test_short_contexts(context: int) -> None:
    """Half of a context of two or three tokens is only the newest token, so that nothing of the cache is kept."""
    model = randomised(LOOKS_BACK, block_size=context).double()
    assert texts(model, [[1], [2, 3]], 12) == [generate_uncached(model, prompt, 12) for prompt in ([1], [2, 3])]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["looks-back", "alibi", "experts", "latent", "longrope", "gemma3", "gpt-oss"])
def test_compiled_step_generates_the_same(name: str) -> None:
    """Including rows that end early, which stay in the batch; one compiled program serves every step."""
    model = randomised(CACHED[name]).double()
    prompts = [[3, 1, 4], [1] * 11, [2]]
    free = texts(model, prompts, 40)
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert texts(model, prompts, 40, compile=True) == free
        assert texts(model, [[1] * 12, [2], [5]], 38, compile=True) == texts(model, [[1] * 12, [2], [5]], 38)
        assert texts(model, prompts, 40, compile=True, end_of_text=free[1][4]) == (
            texts(model, prompts, 40, end_of_text=free[1][4])
        )
        # One row ends at once, and the others exceed the context.
        assert texts(model, prompts, 40, compile=True, end_of_text=free[2][0]) == (
            texts(model, prompts, 40, end_of_text=free[2][0])
        )
        # The last of two batches is not full.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_loop, "MAX_BATCH_ROWS", 3)
            assert texts(model, [*prompts, [7], [8, 9]], 40, compile=True)[:3] == free


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("config", [LOOKS_BACK, ALIBI], ids=["looks-back", "alibi"])
def test_compiled_step_with_a_rolling_cache(config: GPTConfig, rows: int) -> None:
    """One compiled program serves every step, before and after rows exceed the context."""
    model, prompts = randomised(config).double(), [[3, 1, 4], [1] * 11, [2]][:rows]
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert texts(model, prompts, 60, compile=True, sink_tokens=4) == texts(model, prompts, 60, sink_tokens=4)


def test_row_is_independent_of_the_rest_of_the_batch() -> None:
    model, hot = randomised(TINY).double(), Sampling(temperature=2.0, top_k=None, repetition_penalty=1.2)
    prompts = [[3, 1, 4], [1] * 11, [2], [5, 6]]
    together = texts(model, prompts, 40, hot, seeds=[7, 8, 9, 7])
    alone = [texts(model, [p], 40, hot, seeds=[s])[0] for p, s in zip(prompts, [7, 8, 9, 7], strict=True)]
    assert together == alone
    assert texts(model, [[2]], 40, hot, seeds=[1]) != texts(model, [[2]], 40, hot, seeds=[2])


@pytest.fixture
def cache_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each KV cache that is created."""
    created: list[int] = []

    def record(rows: int, *args: object, **settings: object) -> KVCache:
        created.append(rows)
        return KVCache(rows, *args, **settings)  # type: ignore[arg-type]  # passed on unchanged

    monkeypatch.setattr(decode_loop, "KVCache", record)
    return created


@pytest.mark.parametrize(
    ("limit", "value", "batches"),
    [
        ("MAX_BATCH_ROWS", 3, [3, 3, 1]),
        ("MAX_CACHE_BYTES", 2 * (2 * 2 * 32 * 15 * 8), [2, 2, 2, 1]),  # two rows of 15 tokens in float64
        ("MAX_CACHE_BYTES", 1, [1] * 7),
    ],
)
def test_batches_bound_the_cache_and_do_not_change_the_texts(
    monkeypatch: pytest.MonkeyPatch, cache_rows: list[int], limit: str, value: int, batches: list[int]
) -> None:
    """The rows of all batches end after different numbers of tokens, by their end-of-text token or a callback."""
    model, hot = randomised(TINY).double(), Sampling(temperature=2.0, top_k=None, repetition_penalty=1.2)
    prompts, seeds = [[3, 1, 4], [1] * 5, [2], [5, 6], [7], [2], [8, 9]], [7, 8, 9, 7, 1, 2, 3]
    end = texts(model, prompts, 10, hot, seeds=seeds)[4][3]

    def run() -> tuple[list[list[int]], list[list[float]]]:
        logprobs: list[list[float]] = [[] for _ in prompts]
        more = {"seeds": seeds, "end_of_text": end, "logprobs": logprobs}
        return texts(model, prompts, 10, hot, done=lambda row, token: row == 5 and token > 30, **more), logprobs

    together, logprobs = run()
    assert len({len(text) for text in together}) > 2
    assert cache_rows[-1] == len(prompts)
    cache_rows.clear()
    monkeypatch.setattr(decode_loop, limit, value)
    in_batches, logprobs_in_batches = run()
    assert cache_rows == batches
    assert in_batches == together
    for row, other in zip(logprobs, logprobs_in_batches, strict=True):
        assert row == pytest.approx(other, abs=1e-12)


def test_thousands_of_prompts_need_no_more_memory_than_one_batch(cache_rows: list[int]) -> None:
    model = randomised(TINY)
    assert len(texts(model, [[1 + n % 9] for n in range(1000)], 2)) == 1000
    assert sum(cache_rows) == 1000
    assert max(cache_rows) == decode_loop.MAX_BATCH_ROWS


def test_rows_end_independently() -> None:
    model = randomised(TINY).double()
    prompts = [[3, 1, 4], [1] * 11, [2]]
    free = texts(model, prompts, 30)
    ended = texts(model, prompts, 30, end_of_text=free[1][4])
    for long, short in zip(free, ended, strict=True):
        assert short == (long[: long.index(free[1][4])] if free[1][4] in long else long)
    stopped = texts(model, prompts, 30, done=lambda row, token: row == 2 and token == free[2][3])
    assert stopped == [free[0], free[1], free[2][: free[2].index(free[2][3]) + 1]]
    ends = [row for row, token in generate(model, prompts, 5, GREEDY, [0, 0, 0], -1) if token is None]
    assert sorted(ends) == [0, 1, 2]
    assert list(generate(model, prompts, 0, GREEDY, [0, 0, 0], -1)) == [(0, None), (1, None), (2, None)]


def test_cache_size() -> None:
    model = randomised(replace(TINY, n_head=4, n_kv_head=2))
    with torch.no_grad():
        cache, logits = prefill(model, [[1, 2, 3], [4]], capacity=9)
    assert logits.shape == (2, 61)
    assert [[tuple(x.shape) for x in layer] for layer in cache._layers] == [[(2, 2, 9, 8)] * 2] * 2
    assert cache.lengths == [3, 1]


def test_global_random_state_is_unchanged() -> None:
    model = randomised(TINY)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    texts(model, [[1]], 20, Sampling(temperature=2.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_invalid_arguments() -> None:
    model = randomised(TINY)
    with pytest.raises(UserError, match=r"prompt has 25 tokens .* context length is 24"):
        generate(model, [[1], [1] * 25], 1, Sampling(), [0, 0], 0)
    with pytest.raises(UserError, match="max_new_tokens is -1"):
        generate(model, [[1]], -1, Sampling(), [0], 0)
    for sink_tokens in (-1, 24):
        with pytest.raises(UserError, match=f"sink_tokens is {sink_tokens}; .* below the context length, 24"):
            generate(model, [[1]], 1, Sampling(), [0], 0, sink_tokens=sink_tokens)
    for position in ("learned", "sinusoidal"):
        with pytest.raises(UserError, match=f"sink_tokens is 4, but the model has {position} positions"):
            generate(randomised(replace(TINY, position=position)), [[1]], 1, Sampling(), [0], 0, sink_tokens=4)
    custom = randomised(replace(TINY, attention=f"{__name__}.OwnForward"))
    with pytest.raises(UserError, match=r"sink_tokens is 4, but .*OwnForward defines forward"):
        generate(custom, [[1]], 1, Sampling(), [0], 0, sink_tokens=4)


class OwnForward(Attention):
    def forward(self, *arguments: Any) -> Tensor:
        return super().forward(*arguments)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("config", [TINY, LOOKS_BACK, ALIBI], ids=["plain", "looks-back", "alibi"])
def test_logprobs_equal_those_of_a_full_forward_pass(config: GPTConfig, temperature: float) -> None:
    """Within 1e-5, including rows that end early, whose last value is that of the end of text; tokens do not change."""
    model, sampling = randomised(config), Sampling(temperature=temperature, top_k=None)
    prompts = [[3, 1, 4], [1] * 9, [2]]
    with torch.no_grad():
        model.head.weight *= 0.1  # probabilities of all sizes
    end = texts(model, prompts, 12, sampling)[1][5]
    logprobs: list[list[float]] = [[] for _ in prompts]
    found = texts(model, prompts, 12, sampling, end_of_text=end, logprobs=logprobs)
    assert found == texts(model, prompts, 12, sampling, end_of_text=end)
    assert len(logprobs[1]) == len(found[1]) + 1 <= 6
    for prompt, text, chances in zip(prompts, found, logprobs, strict=True):
        whole = [*prompt, *text, end][: len(prompt) + len(chances)]
        logits = model(torch.tensor([whole[:-1]]))[0, len(prompt) - 1 :] / (temperature or 1.0)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(whole[len(prompt) :])[:, None]).flatten()
        torch.testing.assert_close(torch.tensor(chances), expected, rtol=0, atol=1e-5)


class AttentionByHand(nn.Module):
    """Attention of one query at a time to the keys of chosen tokens, which are stored before they are rotated."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.visible: Sequence[int] = ()
        """Indices of the tokens to which the query attends, in order; their positions are 0, 1, 2, ..."""

    def forward(self, x: Tensor, position: Any, layout: AttentionLayout, value_embedding: Any, _: Any) -> Tensor:
        own, config, D = self.attention, self.attention.config, self.attention.head_dim
        q, k, v = own.query(x[0, 0]), own.key(x[0, 0]), own.value(x[0, 0])
        if config.qk_norm_joint:
            q, k = own.query_norm(q).view(-1, D), own.key_norm(k).view(-1, D)
        else:
            q, k = own.query_norm(q.view(-1, D)), own.key_norm(k.view(-1, D))  # (heads, head_dim)
        self.keys.append(k)
        self.values.append((v if value_embedding is None else v + value_embedding[0, 0]).view(-1, D))
        n, group = len(self.visible), own.n_head // own.n_kv_head
        keys = torch.stack([self.keys[token] for token in self.visible], 1).repeat_interleave(
            group, 0
        )  # (n_head, n, D)
        values = torch.stack([self.values[token] for token in self.visible], 1).repeat_interleave(group, 0)
        if layout.cos_sin is not None:
            q = position.rotate(q[None, :, None], position.cos_sin(torch.tensor([n - 1]), [n]))[0, :, 0]
            keys = position.rotate(keys[None], position.cos_sin(torch.arange(n), [n]))[0]
        scores = torch.einsum("hd,hnd->hn", q, keys) / D**0.5
        if config.attention_softcap:
            scores = config.attention_softcap * (scores / config.attention_softcap).tanh()
        distance = n - 1 - torch.arange(n)
        if config.position == "alibi":
            scores = (
                scores
                - torch.tensor([2.0 ** (-8 / own.n_head * (h + 1)) for h in range(own.n_head)])[:, None] * distance
            )
        if config.sliding_window:
            scores = scores.masked_fill(distance >= config.sliding_window, float("-inf"))
        out: Tensor = own.output(torch.einsum("hn,hnd->hd", scores.softmax(-1), values).flatten())
        return out[None, None]


@torch.no_grad()
def logits_by_hand(config: GPTConfig, text: list[int], sink_tokens: int) -> Tensor:
    """Logits after each token, which attends to exactly the sink tokens and the most recent ones."""
    model = randomised(config).double()
    hands = [AttentionByHand(block.attention) for block in model.blocks]  # type: ignore[arg-type]  # built-in attention
    for block, hand in zip(model.blocks, hands, strict=True):
        block.attention = hand
    previous = KVCache(1, 1, torch.device("cpu"), torch.float64)  # only for smear and bigrams
    found = []
    for t, token in enumerate(text):
        recent = range(max(0, t + 1 - model.block_size + sink_tokens), t + 1)
        visible = [*range(sink_tokens), *recent] if t >= model.block_size else range(t + 1)
        assert len(visible) == min(t + 1, model.block_size)
        for hand in hands:
            hand.visible = visible
        positions = torch.tensor([len(visible) - 1])
        layout = AttentionLayout(positions, model.position.cos_sin(positions, [len(visible)]), None)
        layouts = {config.is_local(layer): layout for layer in range(config.n_layer)}
        found.append(model.apply_head(model.forward_blocks(torch.tensor([[token]]), layouts, previous))[0, 0])
    return torch.stack(found)


SKIPS = replace(OLMO2, rotary_share=0.5, n_kv_head=1)
ROLLS = {
    "plain": TINY,
    "looks-back": LOOKS_BACK,
    "alibi": ALIBI,
    "skips": SKIPS,
    "none": replace(TINY, position="none"),
}


@pytest.mark.parametrize("sink_tokens", [0, 1, 4, 23])
@pytest.mark.parametrize("config", ROLLS.values(), ids=ROLLS)
def test_rolling_cache_attends_to_exactly_the_sink_tokens_and_the_most_recent_ones(
    config: GPTConfig, sink_tokens: int
) -> None:
    """In float64, for four contexts of text, with prompts of different lengths in one batch, of which one is full."""
    model = randomised(config).double()
    prompts, n = [[3, 1, 4], [1] * 11, list(range(24))], 90
    logprobs: list[list[float]] = [[] for _ in prompts]
    sampling = Sampling(temperature=1.0, top_k=None)
    found = texts(model, prompts, n, sampling, sink_tokens=sink_tokens, logprobs=logprobs)
    for prompt, text, values in zip(prompts, found, logprobs, strict=True):
        whole = [*prompt, *text]
        expected = logits_by_hand(config, whole[:-1], sink_tokens).log_softmax(-1)[len(prompt) - 1 :]
        expected = expected.gather(1, torch.tensor(text)[:, None]).flatten()
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("config", ROLLS.values(), ids=ROLLS)
def test_rolling_cache_changes_nothing_within_the_context(config: GPTConfig) -> None:
    """Bitwise, in float32 and bfloat16; afterwards, the texts differ from those of each other way."""
    for model in (randomised(config), randomised(config).bfloat16()):
        prompts = [[3, 1, 4], [1] * 9, [2]]
        assert texts(model, prompts, 15) == texts(model, prompts, 15, sink_tokens=4)
        logprobs: list[list[list[float]]] = [[[] for _ in prompts] for _ in range(2)]
        texts(model, prompts, 15, logprobs=logprobs[0])
        texts(model, prompts, 15, sink_tokens=4, logprobs=logprobs[1])
        assert logprobs[0] == logprobs[1]


@given(
    sinks=st.integers(0, 23), lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3), n=st.integers(1, 40),
    compiled=st.booleans(),
)  # fmt: skip
@example(sinks=8, lengths=[4], n=4, compiled=False)
@example(sinks=4, lengths=[3], n=1, compiled=False)
@example(sinks=8, lengths=[3], n=4, compiled=True)
@settings(max_examples=25)
def test_any_number_of_sink_tokens_suits_any_text(sinks: int, lengths: list[int], n: int, compiled: bool) -> None:
    """Also if the cache is smaller than the context, whether or not its size is rounded up for a compiled step."""
    model = randomised(TINY).double()
    prompts = [[7 + row] * length for row, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_loop, "_compiled_step", lambda model, rows: decode_loop._eager_step(model))
        plain, rolled = (texts(model, prompts, n, compile=compiled, sink_tokens=each) for each in (None, sinks))
    for prompt, expected, found in zip(prompts, plain, rolled, strict=True):
        within = model.block_size - len(prompt) + 1  # the last of them is predicted from a full context
        assert found[:within] == expected[:within]
        assert found == texts(model, [prompt], n, sink_tokens=sinks)[0]


def test_sink_tokens_change_what_follows_the_context() -> None:
    model, hot = randomised(TINY).double(), Sampling(temperature=1.0, top_k=None)
    ways = [texts(model, [[3, 1, 4]], 90, hot, sink_tokens=sinks)[0] for sinks in (None, 0, 4)]
    assert ways[0][:21] == ways[1][:21] == ways[2][:21]
    assert len({tuple(way) for way in ways}) == 3


def test_rolling_cache_has_constant_size_and_cost() -> None:
    """After 20 contexts, the tensors are those of the start, and a step processes one token."""
    model = randomised(LOOKS_BACK)
    with torch.no_grad():
        cache, _ = prefill(model, [[1] * 24, [2]], 24, sink_tokens=4)
        before = [stored.data_ptr() for layer in cache._layers for stored in layer]
        for _ in range(20 * 24):
            model.hidden_states(torch.tensor([[5], [6]]), cache=cache)
            assert cache.visible_length == cache.key_positions.size(-1) == 24
            assert sorted(cache.key_positions[0].tolist()) == list(range(24))
        assert [stored.data_ptr() for layer in cache._layers for stored in layer] == before
        assert cache.lengths == [21 * 24, 20 * 24 + 1]
        with pytest.raises(UserError, match="do not fit"):
            model.hidden_states(torch.tensor([[5, 5], [6, 6]]), cache=cache)


@pytest.mark.parametrize("config", [DYNAMIC, LONGROPE], ids=["dynamic", "longrope"])
def test_frequencies_do_not_change_while_a_cache_rolls(config: GPTConfig) -> None:
    """Within the context, texts equal those of a cache that does not roll; beyond, rows do not affect each other."""
    model, prompts = randomised(config).double(), [[3, 1, 4], [1] * 11, [2]]
    assert texts(model, prompts, 13, sink_tokens=2) == texts(model, prompts, 13)
    together = texts(model, prompts, 60, sink_tokens=2)
    assert together == [texts(model, [prompt], 60, sink_tokens=2)[0] for prompt in prompts]


@pytest.mark.parametrize("context", [1, 2, 3])
def test_short_contexts_roll(context: int) -> None:
    model = randomised(TINY, block_size=context).double()
    for sinks in range(context):
        assert len(texts(model, [[1]], 12, sink_tokens=sinks)[0]) == 12


def test_rows_of_a_rolling_cache_end_independently() -> None:
    model = randomised(TINY).double()
    prompts = [[3, 1, 4], [1] * 11, [2]]
    free = texts(model, prompts, 60, sink_tokens=4)
    assert free == [texts(model, [prompt], 60, sink_tokens=4)[0] for prompt in prompts]
    ended = texts(model, prompts, 60, sink_tokens=4, done=lambda row, token: row == 1 and token == free[1][30])
    assert ended == [free[0], free[1][: free[1].index(free[1][30]) + 1], free[2]]
