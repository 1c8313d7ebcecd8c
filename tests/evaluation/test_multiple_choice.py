"""Choices and minimal pairs against a token-by-token loop, and against chance level."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation import multiple_choice
from lit_gpt_scratch.evaluation.intervals import summarize
from lit_gpt_scratch.evaluation.loglikelihood import ScoredSequence, compute_loglikelihoods, encode_continuation
from lit_gpt_scratch.evaluation.multiple_choice import (
    MultipleChoiceQuestion,
    evaluate_minimal_pairs,
    evaluate_multiple_choice,
)
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.tokenizer import Tokenizer
from tests.conftest import sentences


def row(**fields: Any) -> TableRow:
    return TableRow("rows.jsonl:3", "rows.jsonl: line 3", fields)


def questions(n: int, seed: int = 0) -> list[MultipleChoiceQuestion]:
    rng = random.Random(seed)
    lines = sentences(seed, 200).splitlines()
    return [
        MultipleChoiceQuestion.from_row(
            row(
                question=rng.choice(lines),
                choices=(choices := [line[: rng.randrange(3, 16)] for line in rng.sample(lines, rng.randrange(2, 5))]),
                answer=rng.randrange(len(choices)),
            )
        )
        for _ in range(n)
    ]


def nats(model: GPT, tokenizer: Tokenizer, context: str, continuation: str) -> tuple[float, int]:
    """Log-probability of a continuation, one token at a time."""
    read, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    ids = [tokenizer.start_of_text, *whole]
    assert whole[: len(read)] == read
    places = range(1 + len(read), len(ids))
    with torch.no_grad():
        found = [model(torch.tensor([ids[:t]]))[0, -1].log_softmax(-1)[ids[t]].item() for t in places]
    return sum(found), len(found)


@pytest.mark.parametrize("few_shot", [0, 2])
def test_every_normalisation_equals_the_loop(model: GPT, tokenizer: Tokenizer, few_shot: int) -> None:
    model.block_size = 512  # rotary positions are not limited
    asked = questions(14)
    examples = "".join(f"{q.context}{q.choices[q.answer]}\n\n" for q in asked[:few_shot])
    right = {"accuracy": 0, "accuracy_per_token": 0, "accuracy_per_character": 0, "accuracy_per_byte": 0}
    for question in asked[few_shot:]:
        found = [nats(model, tokenizer, examples + question.context, choice) for choice in question.choices]
        values = {
            "accuracy": [n for n, _ in found],
            "accuracy_per_token": [n / tokens for n, tokens in found],
            "accuracy_per_character": [n / len(c[1:]) for (n, _), c in zip(found, question.choices, strict=True)],
            "accuracy_per_byte": [n / len(c[1:].encode()) for (n, _), c in zip(found, question.choices, strict=True)],
        }
        for name, each in values.items():
            right[name] += max(range(len(each)), key=each.__getitem__) == question.answer
    found = summarize(evaluate_multiple_choice(model, tokenizer, asked, few_shot))
    assert found.rows == 14 - few_shot
    assert found.metrics == pytest.approx({name: n / found.rows for name, n in right.items()})


def question(context: str, choices: list[str], answer: int) -> MultipleChoiceQuestion:
    return MultipleChoiceQuestion.from_row(row(question=context, choices=choices, answer=answer))


CAT = question("The cat sees", ["a dog.", "a bird."], 0)


@pytest.mark.parametrize(
    ("other", "equal"),
    [
        (CAT, True),
        (question("the  cat\nsees", ["A dog.", "a bird."], 0), True),
        (question("The cat sees", ["a bird.", "a dog."], 1), True),  # in another order
        (question("The cat sees", ["a dog.", "a bird."], 1), True),  # with another answer
        (question("The cat sees", ["a dog.", "a fish."], 0), True),  # the same answer among other choices
        (question("The cat sees", ["a horse.", "a fish."], 0), False),
        (question("The dog sees", ["a dog.", "a bird."], 0), False),
    ],
)
def test_few_shot_example_equal_to_the_question(
    model: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: Any, other: Any, equal: bool
) -> None:
    """It is replaced with the next question that is not equal, only for this question."""
    first, *rest = questions(3)
    prompts: list[str] = []

    def encode(tokenizer: Tokenizer, context: str, continuation: str) -> ScoredSequence:
        prompts.append(context)
        return encode_continuation(tokenizer, context, continuation)

    monkeypatch.setattr(multiple_choice, "encode_continuation", encode)
    model.block_size = 512
    evaluate_multiple_choice(model, tokenizer, [CAT, first, other, *rest], few_shot=2)
    examples = [f"{each.text}\n\n" for each in (CAT, first, rest[0])]
    assert prompts[0] == "".join(examples[1:] if equal else examples[:2]) + other.context
    assert prompts[-1] == "".join(examples[:2]) + rest[1].context
    assert ("1 of 3 questions are identical to a few-shot example" in caplog.text) == equal


def test_all_questions_equal_to_the_few_shot_example(model: GPT, tokenizer: Tokenizer) -> None:
    """There is no other example, so they are scored without one."""
    alone = summarize(evaluate_multiple_choice(model, tokenizer, [CAT])).metrics
    assert summarize(evaluate_multiple_choice(model, tokenizer, [CAT, CAT], few_shot=1)).metrics == alone


def test_likelihoods_are_independent_of_the_batch(model: GPT, tokenizer: Tokenizer) -> None:
    lines = [line.split(" ") for line in sentences(1, 30).splitlines()]
    boundary = [k % len(words) for k, words in enumerate(lines)]
    tails = [
        encode_continuation(tokenizer, " ".join(words[:k]), " " * (k > 0) + " ".join(words[k:]))
        for words, k in zip(lines, boundary, strict=True)
    ]
    together = compute_loglikelihoods(model, tails)
    for tail, score in zip(tails, together, strict=True):
        [alone] = compute_loglikelihoods(model, [tail])
        assert score.nats == pytest.approx(alone.nats, rel=1e-5)
        ids = torch.tensor([tail.ids])
        best = model(ids[:, :-1]).argmax(-1)[0]
        assert score.greedy == alone.greedy == bool((best == ids[0, 1:])[-tail.n_scored :].all())


def test_greedy_continuations_are_marked(model: GPT, tokenizer: Tokenizer) -> None:
    ids = [tokenizer.start_of_text]
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % tokenizer.vocab_size]
    assert [
        score.greedy
        for score in compute_loglikelihoods(
            model, [ScoredSequence(ids, 8), ScoredSequence(other, 8), ScoredSequence(other[:-1], 7)]
        )
    ] == [
        1,
        0,
        1,
    ]


def test_trailing_white_space_of_the_context_moves_to_the_continuation(tokenizer: Tokenizer) -> None:
    assert encode_continuation(tokenizer, "the cat ", "sees") == encode_continuation(tokenizer, "the cat", " sees")
    assert encode_continuation(tokenizer, "", "sees").ids[0] == tokenizer.start_of_text


def test_uniform_model_scores_at_chance_level(uniform: GPT, tokenizer: Tokenizer) -> None:
    """Exactly, for metrics independent of length: a choice that ties with k - 1 others gets 1/k of the credit."""
    found = summarize(evaluate_multiple_choice(uniform, tokenizer, questions(200)))
    assert found.metrics["accuracy_per_token"] == pytest.approx(found.extra["chance"])
    low, high = found.intervals["accuracy"]
    assert low < found.extra["chance"] < high
    pairs = [
        MultipleChoiceQuestion.from_pair(row(sentence_good=a, sentence_bad=" ".join(reversed(a.split()))))
        for a in ("xx yy zz", "qq ww ee rr")
    ]
    assert summarize(evaluate_minimal_pairs(uniform, tokenizer, pairs)).metrics == {"accuracy": 0.5}


def test_minimal_pairs_are_whole_documents(model: GPT, tokenizer: Tokenizer) -> None:
    lines = sentences(5, 40).splitlines()
    pairs = [MultipleChoiceQuestion.from_pair(row(sentence_good=a, sentence_bad=b)) for a, b in pairwise(lines)]
    wins = [
        0.5 if a == b else float(nats(model, tokenizer, "", a)[0] > nats(model, tokenizer, "", b)[0])
        for a, b in pairwise(lines)
    ]
    found = summarize(evaluate_minimal_pairs(model, tokenizer, pairs))
    assert found.metrics["accuracy"] == pytest.approx(sum(wins) / len(wins))
    assert found.extra == {"chance": 0.5}


@pytest.mark.parametrize(
    ("fields", "context", "answer"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "q", 1),
        ({"context": "c", "choices": ["a", "b"], "answer": "a"}, "c", 0),
        ({"context": "c", "question": "q", "choices": ["a", "b"], "answer": 0}, "c\nq", 0),
        ({"context": None, "question": "q", "choices": ["a", "b"], "answer": 0}, "q", 0),
    ],
)
def test_reading_rows(fields: dict[str, Any], context: str, answer: int) -> None:
    assert MultipleChoiceQuestion.from_row(row(**fields)) == MultipleChoiceQuestion(
        "rows.jsonl: line 3", context, (" a", " b"), answer
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "no text in column 'question' or 'context'"),
        ({"question": 3, "choices": ["a", "b"], "answer": 0}, "'question' must be a string, but its type is int"),
        ({"question": "q", "answer": 0}, "'choices' must be a list of at least two non-empty strings, but it is None"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two non-empty strings"),
        ({"question": "q", "choices": ["a", 2], "answer": 0}, "at least two non-empty strings"),
        ({"question": "q", "choices": ["a", "b"]}, "'answer' is None"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "'answer' is 2; it must be an index from 0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": -1}, "'answer' is -1"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "'answer' is True"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "or one of 'a', 'b'"),
    ],
)
def test_invalid_rows_are_reported(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        MultipleChoiceQuestion.from_row(row(**fields))
    assert str(error.value).startswith("rows.jsonl: line 3")
    assert message in str(error.value)


def test_too_long_questions_are_reported(model: GPT, tokenizer: Tokenizer) -> None:
    long = MultipleChoiceQuestion.from_row(row(question="word " * 60, choices=["a", "b"], answer=0))
    with pytest.raises(UserError, match=r"line 3 has .* but the context length is 64"):
        evaluate_multiple_choice(model, tokenizer, [long])
    with pytest.raises(UserError, match="--few_shot: 3 examples leave none of the 3 rows to score"):
        evaluate_multiple_choice(model, tokenizer, questions(3), few_shot=3)
