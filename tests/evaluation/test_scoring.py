"""Scores against a loop that predicts one token at a time."""

import math

import pytest
import torch

from lit_gpt_scratch.evaluation.scoring import score
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import TINY, randomised, sentences


def test_every_byte_is_scored_once_with_its_windows_context() -> None:
    tokenizer = Tokenizer.train([sentences(1)], 280)
    model = randomised(TINY, vocab_size=tokenizer.vocab_size, block_size=24)
    texts = ["a", sentences(3, 4), "é…\r\n" * 30]
    nats, tokens = 0.0, 0
    for text in texts:
        ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
        for t in range(1, len(ids)):
            start = (t - 1) // 24 * 24
            logits = model(torch.tensor([ids[start:t]]))[0, -1]
            nats -= logits.log_softmax(-1)[ids[t]].item()
            tokens += 1
    figures = score(model, tokenizer, texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert figures["tokens"] == tokens
    assert figures["bytes"] == n_bytes
    assert figures["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary_a_token() -> None:
    tokenizer = Tokenizer.train(["x"], 257)  # bytes alone
    model = randomised(TINY, vocab_size=257)
    torch.nn.init.zeros_(model.head.weight)
    assert score(model, tokenizer, ["any text"])["bits_per_byte"] == pytest.approx(math.log2(257))
