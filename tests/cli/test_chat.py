"""Chat in the terminal: which turns stay in the context."""

from collections.abc import Iterator
from typing import Any

import pytest

from lit_gpt_scratch.cli import chat
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import TINY, randomised


def test_a_message_that_is_too_long_leaves_the_conversation_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = Tokenizer.train([], 300, "byte")
    model = randomised(TINY, vocab_size=tokenizer.vocab_size, block_size=128)
    seen: list[str] = []

    def write(
        _: Any, tokenizer: Tokenizer, prompts: list[list[int]], *__: Any, **more: Any
    ) -> Iterator[tuple[int, str]]:
        seen.append(tokenizer.decode(prompts[0]))
        assert more == {"sink_tokens": 4}
        yield 0, "Yes."

    monkeypatch.setattr(chat, "stream_text", write)
    lines = ["My name is Bo.", "x" * 200, "Who am I?"]
    replies = list(chat.chat_session(model, tokenizer, None, lines, 20, Sampling(), 0, sink_tokens=4))
    assert replies == ["Yes.", ""] * 2
    assert "shorten it" in caplog.text
    assert "dropping" not in caplog.text
    assert "My name is Bo." in seen[1]
    assert "x" * 200 not in seen[1]
