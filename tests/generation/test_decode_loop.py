"""The cached generation loop against a loop without a cache."""

from dataclasses import replace

import pytest
import torch

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation import decode_loop
from lit_gpt_scratch.generation.decode_loop import generate, prefill
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.model import GPT, GPTConfig
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


OLMO2 = replace(TINY, n_layer=3, qk_norm_joint=True, norm_placement="output", qkv_bias=True, rotary_skip_every=2)


EXPERTS = replace(TINY, feed_forward="moe", n_shared_experts=1, expert_bias_rate=0.1)


@pytest.mark.parametrize(
    "config", [TINY, LOOKS_BACK, ALIBI, OLMO2, EXPERTS], ids=["plain", "looks-back", "alibi", "olmo2", "experts"]
)
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
@pytest.mark.parametrize("config", [LOOKS_BACK, ALIBI, EXPERTS], ids=["looks-back", "alibi", "experts"])
def test_compiled_step_generates_the_same(config: GPTConfig) -> None:
    """Including rows that end early, which stay in the batch; one compiled program serves every step."""
    model = randomised(config).double()
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
    assert [tuple(keys.shape) for keys in cache._keys] == [(2, 2, 9, 8)] * 2
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
