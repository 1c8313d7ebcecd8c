"""A conversation in the terminal: what is remembered of it."""

from collections.abc import Iterator
from typing import Any

import pytest

from lit_gpt_scratch.cli import chat
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import TINY, randomised


def test_a_line_that_is_too_long_leaves_what_was_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer.train([], 300, "byte")
    model = randomised(TINY, vocab_size=tokenizer.vocab_size, block_size=128)
    seen: list[str] = []

    def write(model: Any, tokenizer: Tokenizer, prompts: list[list[int]], *_: Any) -> Iterator[tuple[int, str]]:
        seen.append(tokenizer.decode(prompts[0]))
        yield 0, "Yes."

    monkeypatch.setattr(chat, "stream_text", write)
    lines = ["My name is Bo.", "x" * 200, "Who am I?"]
    replies = list(chat.chat_session(model, tokenizer, None, lines, 20, Sampling(), 0))
    assert replies == ["Yes.", ""] * 2
    assert "say it shorter" in caplog.text
    assert "forgotten" not in caplog.text
    assert "My name is Bo." in seen[1]
    assert "x" * 200 not in seen[1]
