"""Scores against a loop that scores one token at a time."""

import math

import numpy as np
import pytest
import torch

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation.intervals import MIN_ROWS, summarize
from lit_gpt_scratch.evaluation.perplexity import evaluate_perplexity, score_documents
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import TINY, randomised, sentences


def one_by_one(model: GPT, tokenizer: Tokenizer, texts: list[str], window: int, stride: int) -> tuple[float, int]:
    """Score each token with the context of the first window that contains it: summed nats, and number of tokens."""
    nats, tokens = 0.0, 0
    for text in texts:
        ids = [tokenizer.start_of_text, *tokenizer.encode(text)]
        for t in range(1, len(ids)):
            start = 0
            while start + window < t:
                start += stride
            logits = model(torch.tensor([ids[start:t]]))[0, -1]
            nats -= logits.log_softmax(-1)[ids[t]].item()
            tokens += 1
    return nats, tokens


@pytest.mark.parametrize(
    ("window", "stride"), [(24, 24), (24, 1), (24, 7), (24, 23), (10, 3), (1, 1), (5, 5), (23, 16)]
)
def test_any_window_and_stride_equals_the_loop(window: int, stride: int) -> None:
    tokenizer = Tokenizer.train([sentences(1)], 280)
    model = randomised(TINY, vocab_size=tokenizer.vocab_size, block_size=24).double()
    texts = ["a", sentences(3, 2), sentences(4, 1), "é…\r\n" * 7]
    nats, tokens = one_by_one(model, tokenizer, texts, window, stride)
    figures = score_documents(model, tokenizer, texts, window, stride)
    assert figures["tokens"] == tokens
    assert figures["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-9)
    single = score_documents(model.float(), tokenizer, texts, window, stride)
    assert single["loss"] == pytest.approx(nats / tokens, rel=1e-6)
    assert single["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-6 * nats / tokens)


@pytest.mark.parametrize(("window", "stride"), [(0, None), (25, None), (24, 0), (24, 25), (10, 11)])
def test_invalid_windows(window: int, stride: int | None) -> None:
    tokenizer = Tokenizer.train(["x"], 257)
    with pytest.raises(UserError, match=r"--(window|stride): \d+ is not between 1 and"):
        evaluate_perplexity(randomised(TINY, vocab_size=257, block_size=24), tokenizer, ["text"], window, stride)


@pytest.mark.parametrize("n", [1, MIN_ROWS - 1, MIN_ROWS, 150])
def test_intervals_are_from_documents_if_there_are_enough(n: int) -> None:
    """Each of up to 100 documents is left out once, with all its windows; t with 29 degrees of freedom."""
    tokenizer = Tokenizer.train([sentences(1)], 280)
    model = randomised(TINY, vocab_size=tokenizer.vocab_size, block_size=24)
    texts = [sentences(seed, 2 + seed % 3) for seed in range(n)]
    measured = evaluate_perplexity(model, tokenizer, texts)
    found = summarize(measured)
    assert found.from_parts == (n < MIN_ROWS)
    assert found.rows == n
    each = [score_documents(model, tokenizer, [text]) for text in texts]
    if n == MIN_ROWS:
        nats = np.array([one["loss"] * one["tokens"] for one in each])
        tokens = np.array([one["tokens"] for one in each])
        without = (nats.sum() - nats) / (tokens.sum() - tokens)
        half = 2.045230 * math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
        assert found.intervals["loss"] == pytest.approx((found.metrics["loss"] - half, found.metrics["loss"] + half))
    low, high = found.intervals["bits_per_byte"]
    assert low < found.metrics["bits_per_byte"] < high


def test_every_byte_is_scored_once() -> None:
    tokenizer = Tokenizer.train([sentences(1)], 280)
    model = randomised(TINY, vocab_size=tokenizer.vocab_size, block_size=24)
    texts = ["a", sentences(3, 4), "é…\r\n" * 30]
    nats, tokens = one_by_one(model, tokenizer, texts, 24, 24)
    figures = score_documents(model, tokenizer, texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert figures["tokens"] == tokens
    assert figures["bytes"] == n_bytes
    assert figures["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_uniform_model_needs_log2_vocabulary_size_bits_per_token() -> None:
    tokenizer = Tokenizer.train(["x"], 257)  # bytes only
    model = randomised(TINY, vocab_size=257)
    torch.nn.init.zeros_(model.head.weight)
    assert score_documents(model, tokenizer, ["any text"])["bits_per_byte"] == pytest.approx(math.log2(257))
