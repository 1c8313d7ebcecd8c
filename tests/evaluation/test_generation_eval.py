"""Continuations against ``generate``, and n-gram counts by hand."""

import pytest
import torch

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation import generation_eval as module
from lit_gpt_scratch.evaluation.generation_eval import GenerationExample, evaluate_generation, generate_continuations
from lit_gpt_scratch.evaluation.intervals import summarize
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import sentences


def test_continuations_are_greedy(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_SIZE", 3)
    prompts = [line[: 3 + k] for k, line in enumerate(sentences(2, 7).splitlines())]
    expected = []
    for prompt in prompts:
        ids = [tokenizer.start_of_text, *tokenizer.encode(prompt)]
        text = ""
        decode = tokenizer.stream_decoder(ids[1:])
        for _ in range(9):
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
            if token == tokenizer.end_of_text:
                break
            ids.append(token)
            text += decode(token)
        expected.append(text)
    assert generate_continuations(model, tokenizer, prompts, 9) == expected
    references = [f" {text}\n" if k != 2 else "another" for k, text in enumerate(expected)]
    exercises = [GenerationExample("", *both) for both in zip(prompts, references, strict=True)]
    assert summarize(evaluate_generation(model, tokenizer, exercises, 9)).metrics["exact_match"] == pytest.approx(6 / 7)


def test_metrics_by_hand(model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    written = ["a b a b a b", "a b c d e", "b", ""]
    monkeypatch.setattr(module, "generate_continuations", lambda *args: written)
    found = summarize(evaluate_generation(model, tokenizer, [GenerationExample("", "p", "b")] * 4)).metrics
    assert found["exact_match"] == 1 / 4
    assert found["distinct_1"] == pytest.approx(5 / 12)  # a b c d e, of 6 + 5 + 1
    assert found["distinct_2"] == pytest.approx(5 / 9)  # ab ba bc cd de, of 5 + 4
    assert found["repetition_4"] == pytest.approx(
        (1 - 2 / 3) / 4
    )  # abab baba abab in the first; the second has no repetition


def test_invalid_rows_are_reported(model: GPT, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"r: line 2 has no text in column 'reference' \(the row has columns prompt"):
        GenerationExample.from_row(TableRow("r:2", "r: line 2", {"prompt": "x"}))
    with pytest.raises(UserError, match=r"r: line 2: the prompt has \d{3} tokens, but the context length is 64"):
        evaluate_generation(model, tokenizer, [GenerationExample("r: line 2", "word " * 60, "x")])
