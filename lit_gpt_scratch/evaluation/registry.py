"""Kinds of evaluation: a row each, from a source to figures."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final

import numpy as np

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation import (
    chat_eval,
    classification_eval,
    generation_eval,
    jsonl,
    multiple_choice,
    perplexity,
)
from lit_gpt_scratch.evaluation.chat_eval import ChatExample
from lit_gpt_scratch.evaluation.classification_eval import LabeledText
from lit_gpt_scratch.evaluation.contamination import find_contaminated, iterate_training_documents
from lit_gpt_scratch.evaluation.generation_eval import GenerationExample
from lit_gpt_scratch.evaluation.intervals import Measurements, ScoreSummary, summarize, wilson_interval
from lit_gpt_scratch.evaluation.multiple_choice import MultipleChoiceQuestion
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.sources import read_documents
from lit_gpt_scratch.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class EvalRequest:
    """What is asked of a model; each kind takes its part of it.

    Attributes:
        source: Where the rows, or the documents, are.
        limit: Take so many of them.
        against: What the model was trained on, to look for them in it.
        text_column: The column with the text, of documents and of labelled rows.
        label_column: The column with the class.
        window: As for ``perplexity.evaluate_perplexity``.
        stride: As for ``perplexity.evaluate_perplexity``.
        few_shot: As for ``multiple_choice.evaluate_multiple_choice``.
        max_new_tokens: As for ``generation_eval.evaluate_generation``.
        stop: As for ``generation_eval.evaluate_generation``.
        classes: Names of the classes that the model tells apart, if it does.
        pooling: As for ``classification_eval.classify``.
    """

    source: str
    limit: int | None = None
    against: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    window: int | None = None
    stride: int | None = None
    few_shot: int = 0
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    pooling: str = "last"


@dataclass(frozen=True)
class EvalTask:
    """One kind of evaluation.

    Attributes:
        description: What it says, and of which columns.
        read: Rows or documents.
        text: One of them as it would stand in a corpus.
        measure: Ask the model about them.
        flags: Which fields of ``EvalRequest`` it takes, beside ``source``, ``limit`` and ``against``.
        needs_classifier: Whether it is for a classifier rather than a language model.
    """

    description: str
    read: Callable[[EvalRequest], Iterable[Any]]
    text: Callable[[Any], str]
    measure: Callable[[GPT, Tokenizer, Any, EvalRequest], Measurements]
    flags: tuple[str, ...] = ()
    needs_classifier: bool = False


EVAL_TASKS: Final = {
    "text": EvalTask(
        "how well a text is predicted",
        lambda asked: read_documents(asked.source, asked.text_column),
        lambda document: str(document.text),
        lambda model, tokenizer, found, asked: perplexity.evaluate_perplexity(
            model, tokenizer, (document.text for document in found), asked.window, asked.stride
        ),
        ("text_column", "window", "stride"),
    ),
    "multiple_choice": EvalTask(
        "which choice is likeliest: question or context, choices, answer",
        lambda asked: map(MultipleChoiceQuestion.from_row, jsonl.read_rows(asked.source)),
        lambda question: str(question.text),
        lambda model, tokenizer, found, asked: multiple_choice.evaluate_multiple_choice(
            model, tokenizer, found, asked.few_shot
        ),
        ("few_shot",),
    ),
    "minimal_pairs": EvalTask(
        "which sentence is likelier: sentence_good, sentence_bad",
        lambda asked: map(MultipleChoiceQuestion.from_pair, jsonl.read_rows(asked.source)),
        lambda pair: str(pair.text),
        lambda model, tokenizer, found, asked: multiple_choice.evaluate_minimal_pairs(model, tokenizer, found),
    ),
    "generation": EvalTask(
        "what is written after prompts: prompt, reference",
        lambda asked: map(GenerationExample.from_row, jsonl.read_rows(asked.source)),
        lambda exercise: str(exercise.text),
        lambda model, tokenizer, found, asked: generation_eval.evaluate_generation(
            model, tokenizer, found, asked.max_new_tokens, asked.stop
        ),
        ("max_new_tokens", "stop"),
    ),
    "replies": EvalTask(
        "what is replied in the chat template: messages, or instruction, input, output",
        lambda asked: map(ChatExample.from_row, jsonl.read_rows(asked.source)),
        lambda found: str(found.text),
        lambda model, tokenizer, found, asked: chat_eval.evaluate_chat(model, tokenizer, found, asked.max_new_tokens),
        ("max_new_tokens",),
    ),
    "classification": EvalTask(
        "which class a text is given: text, label",
        lambda asked: (
            LabeledText.from_row(row, asked.text_column, asked.label_column, asked.classes)
            for row in jsonl.read_rows(asked.source)
        ),
        lambda labelled: str(labelled.text),
        lambda model, tokenizer, found, asked: classification_eval.evaluate_classification(
            model, tokenizer, found, asked.classes, asked.pooling
        ),
        ("text_column", "label_column"),
        needs_classifier=True,
    ),
}


@dataclass(frozen=True)
class EvalResult:
    """Scores of all rows; and, if the training text was searched for them, how many it holds, and scores without those.

    Attributes:
        scores: Of all.
        contaminated: How many rows are in the training text.
        clean: Of the others; None if there are none, or nobody looked.
    """

    scores: ScoreSummary
    contaminated: int | None = None
    clean: ScoreSummary | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: figures and facts by name, their ``intervals``, and ``contamination``."""
        found = summary_to_dict(self.scores)
        if self.contaminated is not None:
            share = self.contaminated / self.scores.rows
            found["contamination"] = {
                "rows": self.contaminated,
                "share": share,
                "interval": list(wilson_interval(share, self.scores.rows)),
                "clean": self.clean and summary_to_dict(self.clean),
            }
        return found


def evaluate(name: str, model: GPT, tokenizer: Tokenizer, asked: EvalRequest) -> EvalResult:
    """Score a model.

    Args:
        name: Of a kind.
        model: In evaluation mode, with the head that the kind is about.
        tokenizer: The model's.
        asked: What the kind needs.

    Raises:
        UserError: A row is not what it must be, or there is none.
    """
    kind = EVAL_TASKS[name]
    found = islice(kind.read(asked), asked.limit)
    # A text may be too large to be kept, unless it has to be looked for.
    kept = found if name == "text" and asked.against is None else list(found)
    if kept == []:
        raise UserError(f"{asked.source} has no rows")
    measured = kind.measure(model, tokenizer, kept, asked)
    if asked.against is None:
        return EvalResult(summarize(measured))
    texts = [kind.text(each) for each in kept][-measured.n_rows :]  # the first may be examples
    dirty = find_contaminated(texts, _read_training_texts(name, asked, asked.against))
    return EvalResult(summarize(measured), int(np.sum(dirty)), None if dirty.all() else summarize(measured, ~dirty))


def _read_training_texts(name: str, asked: EvalRequest, source: str) -> Iterable[str]:
    """The texts of what was trained on: rows such as are asked about, or documents.

    Raises:
        UserError: It is missing, or neither.
    """
    kind, same = EVAL_TASKS[name], replace(asked, source=source)
    if "text_column" in kind.flags:
        return iterate_training_documents(source, asked.text_column)
    try:
        for _ in kind.read(same):
            break
    except UserError:  # rows of another kind, or none
        return iterate_training_documents(source)
    return map(kind.text, kind.read(same))


def summary_to_dict(found: ScoreSummary) -> dict[str, Any]:
    """As JSON has it."""
    return {
        "rows": found.rows,
        **{name: None if math.isnan(value) else value for name, value in found.metrics.items()},
        **found.extra,
        "intervals_of": "parts" if found.from_parts else "rows",
        "intervals": {name: ends and list(ends) for name, ends in found.intervals.items()},
    }
