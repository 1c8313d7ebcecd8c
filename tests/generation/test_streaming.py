"""Streamed text: stop strings across token boundaries, and characters of several tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.generation import streaming
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.generation.streaming import _StopStringBuffer, stream_text
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import TINY, randomised


@given(
    pieces=st.lists(st.text("ab\n", min_size=0, max_size=3), max_size=12),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300)
def test_text_ends_before_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    text, found = _StopStringBuffer(lambda n: pieces[n], tuple(stop)), ""
    for n in range(len(pieces)):
        found += text.add(n)
        so_far = "".join(pieces[: n + 1])
        assert so_far.startswith(found)
        if text.stopped:
            break
        # Only the possible beginning of a stop string is held back.
        assert len(so_far) - len(found) < max(map(len, stop), default=1)
    found += text.flush()
    whole = "".join(pieces)
    ends = [whole.find(s) for s in stop if s in whole]
    if not ends:
        assert found == whole
    else:
        assert text.stopped
        assert not any(s in found for s in stop)
        assert whole.startswith(found)
        assert any(whole[len(found) :].startswith(s) for s in stop)


def test_streamed_texts_equal_the_decoded_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.train(["some text"], 257, "byte")
    model = randomised(TINY, vocab_size=tokenizer.vocab_size, block_size=64)
    prompts = ["some", "", "τέξτ"]
    whole = ["", "", ""]
    for row, piece in stream_text(model, tokenizer, prompts, 30, Sampling(temperature=0.0), [0, 0, 0]):
        whole[row] += piece
    script = {row: list(text.encode()) for row, text in enumerate(["one. two. three", "été. x", "no end"])}

    def scripted(model: object, ids: list[list[int]], *_: object, sink_tokens: object) -> object:
        assert [tokenizer.decode(prompt[1:]) for prompt in ids] == prompts
        done = _[-2]
        for row, text in script.items():
            for token in tokenizer.encode(bytes(text).decode()):
                yield row, token
                if done(row, token):  # type: ignore[operator]  # the callback
                    break
            yield row, None

    monkeypatch.setattr(streaming, "generate", scripted)
    pieces = list(stream_text(model, tokenizer, prompts, 30, Sampling(), [0, 0, 0], stop=[". "]))
    assert ["".join(piece for r, piece in pieces if r == row) for row in range(3)] == ["one", "été", "no end"]
    assert [row for row, piece in pieces if piece == ""] == [0, 1, 2]
    with pytest.raises(UserError, match="stop string is empty"):
        stream_text(model, tokenizer, [""], 1, Sampling(), [0], stop=[""])
    assert torch.is_grad_enabled()
