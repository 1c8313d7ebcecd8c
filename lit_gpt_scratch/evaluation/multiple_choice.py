"""Which of several texts a model finds likeliest: questions with choices, and minimal pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation import jsonl
from lit_gpt_scratch.evaluation.intervals import Measurements
from lit_gpt_scratch.evaluation.loglikelihood import ScoredSequence, compute_loglikelihoods, encode_continuation
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.tokenizer import Tokenizer

EXAMPLE_SEPARATOR: Final = "\n\n"
"""What stands between examples, as in ``lm-eval``."""
TIE_TOLERANCE: Final = 1e-6
"""Relative; log-probabilities that differ by less are one, as far as float32 can tell."""


@dataclass(frozen=True)
class MultipleChoiceQuestion:
    """A text and its continuations, one of which is right.

    Attributes:
        where: Its place.
        context: What stands before; empty in front of whole texts.
        choices: Continuations, each with the space that it begins with.
        answer: Which is right, from 0.
    """

    where: str
    context: str
    choices: tuple[str, ...]
    answer: int

    @classmethod
    def from_row(cls, row: TableRow) -> "MultipleChoiceQuestion":
        """Of the columns ``question``, ``context`` or both, ``choices``, and ``answer``, a choice or its number from 0.

        Raises:
            UserError: One is missing or is not what it must be.
        """
        context = jsonl.get_text(row, "question", "context")
        if context != (before := row.fields.get("context")) and before:
            context = jsonl.get_text(row, "context") + "\n" + context
        choices = jsonl.get_texts(row, "choices")
        answer = jsonl.get_choice(row, "answer", choices)
        return cls(row.where, context, tuple(f" {choice}" for choice in choices), answer)

    @classmethod
    def from_pair(cls, row: TableRow) -> "MultipleChoiceQuestion":
        """Of the columns ``sentence_good`` and ``sentence_bad``, as in BLiMP (https://arxiv.org/abs/1912.00582).

        Raises:
            UserError: One is missing or is no text.
        """
        return cls(row.where, "", (jsonl.get_text(row, "sentence_good"), jsonl.get_text(row, "sentence_bad")), 0)

    @property
    def text(self) -> str:
        """As it would stand in a corpus: with the right answer."""
        return self.context + self.choices[self.answer]


def evaluate_multiple_choice(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[MultipleChoiceQuestion], few_shot: int = 0
) -> Measurements:
    """Take the choice that is likeliest behind the question, the sum of its tokens' log-probabilities being its own.

    A longer choice has more tokens to lose by, so three more figures divide by the choice's tokens, characters and
    bytes; without the space before it, the last two are ``acc_norm`` and ``acc_bytes`` of ``lm-eval``. Where several
    are equally likely, each counts for its share, so that a model that knows nothing scores chance.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        questions: With choices.
        few_shot: How many questions, with their answers, stand before each of the others, as examples; these are the
            first, and are not scored themselves.

    Returns:
        ``accuracy``, ``accuracy_per_token``, ``accuracy_per_character``, ``accuracy_per_byte``; and ``chance``.

    Raises:
        UserError: A question is longer than the context, or too few are left.
    """
    if not 0 <= few_shot < len(questions):
        raise UserError(f"argument --few_shot: {few_shot} examples of {len(questions)} rows leave none to be scored")
    examples = "".join(example.text + EXAMPLE_SEPARATOR for example in questions[:few_shot])
    asked = questions[few_shot:]
    tails = [
        _encode_choice(model, tokenizer, question, examples, choice)
        for question in asked
        for choice in question.choices
    ]
    nats = np.array([said.nats for said in compute_loglikelihoods(model, tails)])
    bare = [choice[1:] if question.context else choice for question in asked for choice in question.choices]
    lengths = {
        "accuracy": np.ones(len(tails)),
        "accuracy_per_token": np.array([tail.scored for tail in tails]),
        "accuracy_per_character": np.array([len(choice) for choice in bare]),
        "accuracy_per_byte": np.array([len(choice.encode()) for choice in bare]),
    }
    begins = np.cumsum([0] + [len(question.choices) for question in asked])
    answers = begins[:-1] + [question.answer for question in asked]
    right = {name: _score_answers(nats / length, begins, answers) for name, length in lengths.items()}
    chances = 1 / np.diff(begins)
    return Measurements.from_rows(
        len(asked),
        lambda places: {name: float(each[places].mean()) for name, each in right.items()},
        frozenset(right),
        lambda places: {"chance": float(chances[places].mean())},
    )


def evaluate_minimal_pairs(model: GPT, tokenizer: Tokenizer, pairs: Sequence[MultipleChoiceQuestion]) -> Measurements:
    """How often the good sentence is likelier than the bad one, each as a whole document.

    Returns:
        ``accuracy``; and ``chance``.
    """
    measured = evaluate_multiple_choice(model, tokenizer, pairs)
    return Measurements.from_rows(
        measured.n_rows,
        lambda places: {"accuracy": measured.metrics(places)["accuracy"]},
        measured.shares,
        measured.extra,
    )


def _encode_choice(
    model: GPT, tokenizer: Tokenizer, question: MultipleChoiceQuestion, examples: str, choice: str
) -> ScoredSequence:
    try:
        tail = encode_continuation(tokenizer, examples + question.context, choice)
    except UserError as error:
        raise UserError(f"{question.where}: the choice {error}") from error
    if len(tail.ids) - 1 > model.block_size:
        raise UserError(
            f"{question.where} has {len(tail.ids) - 1} tokens with the choice {choice!r:.40}, and the context holds "
            f"{model.block_size}" + ("; give fewer examples: --few_shot" if examples else "")
        )
    return tail


def _score_answers(
    values: NDArray[np.float64], begins: NDArray[np.int64], answers: NDArray[np.int64]
) -> NDArray[np.float64]:
    """For each question 1 if its answer's value is the largest, a share of 1 if it is among several, else 0: (n,)."""
    best = np.repeat(np.maximum.reduceat(values, begins[:-1]), np.diff(begins))
    among = values >= best - TIE_TOLERANCE * np.abs(best)
    return np.where(among[answers], 1 / np.add.reduceat(among.astype(int), begins[:-1]), 0.0)
