"""Evaluate multiple-choice questions and minimal pairs by comparing log-likelihoods."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation import benchmark_rows
from lit_gpt_scratch.evaluation.intervals import Measurements
from lit_gpt_scratch.evaluation.loglikelihood import ScoredSequence, compute_loglikelihoods, encode_continuation
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

EXAMPLE_SEPARATOR: Final = "\n\n"
"""Separator between few-shot examples, as in ``lm-eval``."""
TIE_TOLERANCE: Final = 1e-6
"""Maximum relative difference at which log-likelihoods, which are computed in float32, count as tied."""


@dataclass(frozen=True)
class MultipleChoiceQuestion:
    """Context with several continuations, one of which is correct.

    Attributes:
        where: Source and line of the row, used in error messages.
        context: Text before the choices; empty if each choice is a whole document.
        choices: Continuations, including any leading space.
        answer: Zero-based index of the correct choice.
    """

    where: str
    context: str
    choices: tuple[str, ...]
    answer: int

    @classmethod
    def from_row(cls, row: TableRow) -> "MultipleChoiceQuestion":
        """Read a benchmark row with the columns ``question`` or ``context`` (or both), ``choices`` and ``answer``.

        ``answer`` contains the correct choice or its zero-based index.

        Raises:
            UserError: A column is missing or invalid.
        """
        context = benchmark_rows.get_text(row, "question", "context")
        if context != (before := row.fields.get("context")) and before:
            context = benchmark_rows.get_text(row, "context") + "\n" + context
        choices = benchmark_rows.get_texts(row, "choices")
        answer = benchmark_rows.get_choice(row, "answer", choices)
        return cls(row.where, context, tuple(f" {choice}" for choice in choices), answer)

    @classmethod
    def from_pair(cls, row: TableRow) -> "MultipleChoiceQuestion":
        """Read the columns ``sentence_good`` and ``sentence_bad`` of BLiMP (https://arxiv.org/abs/1912.00582).

        Raises:
            UserError: A column is missing or is not a string.
        """
        return cls(
            row.where,
            "",
            (benchmark_rows.get_text(row, "sentence_good"), benchmark_rows.get_text(row, "sentence_bad")),
            0,
        )

    @property
    def text(self) -> str:
        """Context followed by the correct choice, used for few-shot examples and for the contamination search."""
        return self.context + self.choices[self.answer]

    def gives_away(self, other: "MultipleChoiceQuestion") -> bool:
        """Return whether this question, used as a few-shot example, would reveal the answer to another question.

        This is the case if both questions have the same context, and the same choices or the same answer. Case and
        whitespace are ignored.
        """
        if _normalize(self.context) != _normalize(other.context):
            return False
        choices, others = (sorted(map(_normalize, question.choices)) for question in (self, other))
        return choices == others or _normalize(self.text) == _normalize(other.text)


def evaluate_multiple_choice(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[MultipleChoiceQuestion], few_shot: int = 0
) -> Measurements:
    """Select the choice with the highest log-likelihood, summed over its tokens, and compare it with the answer.

    The sum favors short choices, so three additional metrics divide it by the number of tokens, characters or bytes.
    The leading space is not counted as a character or byte, so the last two metrics equal ``acc_norm`` and
    ``acc_bytes`` in ``lm-eval``. The credit for a tie is divided equally among the tied choices, so that a uniform
    model scores at chance level.

    Args:
        model: The language model, in evaluation mode.
        tokenizer: The model's tokenizer.
        questions: Questions with choices.
        few_shot: Number of few-shot examples. The first ``few_shot`` questions and their answers are prepended to each
            of the other questions, and are not scored themselves. If an example is identical to the question being
            scored, the next different question takes its place; if there is none, the example is omitted. A warning is
            logged in both cases.

    Returns:
        ``accuracy``, ``accuracy_per_token``, ``accuracy_per_character`` and ``accuracy_per_byte``; and ``chance``,
        the expected accuracy of a random choice.

    Raises:
        UserError: A question is longer than the context, or no questions are left to score.
    """
    if not 0 <= few_shot < len(questions):
        raise UserError(
            f"argument --few_shot: {few_shot} examples leave none of the {len(questions)} rows to score; "
            "use fewer examples"
        )
    scored = questions[few_shot:]
    sequences = []
    for question, examples in zip(scored, _choose_examples(questions, few_shot), strict=True):
        sequences += [_encode_choice(model, tokenizer, question, examples, choice) for choice in question.choices]
    nats = np.array([score.nats for score in compute_loglikelihoods(model, sequences)])
    bare = [choice[1:] if question.context else choice for question in scored for choice in question.choices]
    lengths = {
        "accuracy": np.ones(len(sequences)),
        "accuracy_per_token": np.array([sequence.n_scored for sequence in sequences]),
        "accuracy_per_character": np.array([len(choice) for choice in bare]),
        "accuracy_per_byte": np.array([len(choice.encode()) for choice in bare]),
    }
    begins = np.cumsum([0] + [len(question.choices) for question in scored])
    answers = begins[:-1] + [question.answer for question in scored]
    right = {name: _score_answers(nats / length, begins, answers) for name, length in lengths.items()}
    chances = 1 / np.diff(begins)
    return Measurements.from_rows(
        len(scored),
        lambda indices: {name: float(each[indices].mean()) for name, each in right.items()},
        frozenset(right),
        lambda indices: {"chance": float(chances[indices].mean())},
    )


def evaluate_minimal_pairs(model: GPT, tokenizer: Tokenizer, pairs: Sequence[MultipleChoiceQuestion]) -> Measurements:
    """Measure how often the good sentence of a minimal pair is more probable than the bad sentence.

    Each sentence is scored as a whole document.

    Args:
        model: The language model, in evaluation mode.
        tokenizer: The model's tokenizer.
        pairs: Pairs of sentences.

    Returns:
        ``accuracy``, the fraction of pairs in which the good sentence is more probable; and ``chance``, which is 0.5.
    """
    measured = evaluate_multiple_choice(model, tokenizer, pairs)
    return Measurements.from_rows(
        measured.n_rows,
        lambda indices: {"accuracy": measured.metrics(indices)["accuracy"]},
        measured.shares,
        measured.extra,
    )


def _choose_examples(questions: Sequence[MultipleChoiceQuestion], few_shot: int) -> Iterator[str]:
    """Yield the text of the few-shot examples for each question after the first ``few_shot`` questions."""
    usual = questions[:few_shot]
    n_replaced = 0
    for question in questions[few_shot:]:
        examples = usual
        if any(example.gives_away(question) for example in usual):
            n_replaced += 1
            others = (example for example in questions if not example.gives_away(question))
            examples = list(islice(others, few_shot))
        yield "".join(example.text + EXAMPLE_SEPARATOR for example in examples)
    if n_replaced:
        log.warning(
            "%d of %d questions are identical to a few-shot example, so they get other examples; remove the duplicates",
            n_replaced, len(questions) - few_shot,
        )  # fmt: skip


def _normalize(text: str) -> str:
    return " ".join(text.split()).casefold()


def _encode_choice(
    model: GPT, tokenizer: Tokenizer, question: MultipleChoiceQuestion, examples: str, choice: str
) -> ScoredSequence:
    try:
        sequence = encode_continuation(tokenizer, examples + question.context, choice)
    except UserError as error:
        raise UserError(f"{question.where}: the choice {error}") from error
    if len(sequence.ids) - 1 > model.block_size:
        raise UserError(
            f"{question.where} has {len(sequence.ids) - 1} tokens with the choice {choice!r:.40}, but the context "
            f"length is {model.block_size}; " + ("lower --few_shot" if examples else "remove the row")
        )
    return sequence


def _score_answers(
    values: NDArray[np.float64], begins: NDArray[np.int64], answers: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Score each of n questions: 1 if only the answer has the largest value, 1/k if k choices tie, otherwise 0."""
    best = np.repeat(np.maximum.reduceat(values, begins[:-1]), np.diff(begins))
    is_best = values >= best - TIE_TOLERANCE * np.abs(best)
    return np.where(is_best[answers], 1 / np.add.reduceat(is_best.astype(int), begins[:-1]), 0.0)
