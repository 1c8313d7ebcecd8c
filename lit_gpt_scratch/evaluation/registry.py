"""Registry of evaluation tasks: how each task reads its rows, runs the model and computes its metrics."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final

import numpy as np

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation import (
    benchmark_rows,
    chat_eval,
    classification_eval,
    generation_eval,
    multiple_choice,
    perplexity,
)
from lit_gpt_scratch.evaluation.chat_eval import ChatExample
from lit_gpt_scratch.evaluation.classification_eval import ClassificationExample
from lit_gpt_scratch.evaluation.contamination import find_contaminated, iterate_training_documents
from lit_gpt_scratch.evaluation.generation_eval import GenerationExample
from lit_gpt_scratch.evaluation.intervals import Measurements, ScoreSummary, summarize, wilson_interval
from lit_gpt_scratch.evaluation.multiple_choice import MultipleChoiceQuestion
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.sources import read_documents
from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.text.windows import Windows


@dataclass(frozen=True)
class EvalRequest:
    """Options for an evaluation; each task uses a subset of them.

    Attributes:
        source: Source of the rows or documents.
        limit: Maximum number of rows or documents; None for no limit.
        against: Source of the training data to search for contamination; None skips the search.
        text_column: Name of the column that contains the text, for both unlabeled documents and labeled rows.
        label_column: Name of the column that contains the class label.
        window: See ``perplexity.evaluate_perplexity``.
        stride: See ``perplexity.evaluate_perplexity``.
        few_shot: See ``multiple_choice.evaluate_multiple_choice``.
        max_new_tokens: See ``generation_eval.evaluate_generation``.
        stop: See ``generation_eval.evaluate_generation``.
        classes: Class names of a classifier.
        pooling: See ``classification_eval.classify``.
        windows: See ``classification_eval.classify``.
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
    windows: Windows | None = None


@dataclass(frozen=True)
class EvalTask:
    """Evaluation task that can be selected by name.

    Attributes:
        description: Description of the metrics and columns, for the help text of ``evaluate``.
        read: Function that reads rows or documents.
        text: Function that returns a row as plain text, used to search the training data for contamination.
        measure: Function that runs the model on the rows.
        flags: Fields of ``EvalRequest`` that the task uses in addition to ``source``, ``limit`` and ``against``.
        needs_classifier: Whether the task requires a classifier instead of a language model.
    """

    description: str
    read: Callable[[EvalRequest], Iterable[Any]]
    text: Callable[[Any], str]
    measure: Callable[[GPT, Tokenizer, Any, EvalRequest], Measurements]
    flags: tuple[str, ...] = ()
    needs_classifier: bool = False


EVAL_TASKS: Final = {
    "text": EvalTask(
        "loss, perplexity and bits per byte of documents",
        lambda request: read_documents(request.source, request.text_column),
        lambda document: str(document.text),
        lambda model, tokenizer, rows, request: perplexity.evaluate_perplexity(
            model, tokenizer, (document.text for document in rows), request.window, request.stride
        ),
        ("text_column", "window", "stride"),
    ),
    "multiple_choice": EvalTask(
        "accuracy of the most probable choice; columns: question or context, choices, answer",
        lambda request: map(MultipleChoiceQuestion.from_row, benchmark_rows.read_rows(request.source)),
        lambda question: str(question.text),
        lambda model, tokenizer, rows, request: multiple_choice.evaluate_multiple_choice(
            model, tokenizer, rows, request.few_shot
        ),
        ("few_shot",),
    ),
    "minimal_pairs": EvalTask(
        "fraction of pairs in which the good sentence is more probable; columns: sentence_good, sentence_bad",
        lambda request: map(MultipleChoiceQuestion.from_pair, benchmark_rows.read_rows(request.source)),
        lambda pair: str(pair.text),
        lambda model, tokenizer, rows, request: multiple_choice.evaluate_minimal_pairs(model, tokenizer, rows),
    ),
    "generation": EvalTask(
        "greedy continuations of prompts; columns: prompt, reference",
        lambda request: map(GenerationExample.from_row, benchmark_rows.read_rows(request.source)),
        lambda example: str(example.text),
        lambda model, tokenizer, rows, request: generation_eval.evaluate_generation(
            model, tokenizer, rows, request.max_new_tokens, request.stop
        ),
        ("max_new_tokens", "stop"),
    ),
    "replies": EvalTask(
        "greedy replies to conversations; columns: messages, or instruction, input, output",
        lambda request: map(ChatExample.from_row, benchmark_rows.read_rows(request.source)),
        lambda example: str(example.text),
        lambda model, tokenizer, rows, request: chat_eval.evaluate_chat(model, tokenizer, rows, request.max_new_tokens),
        ("max_new_tokens",),
    ),
    "classification": EvalTask(
        "accuracy, F1 and AUROC of a classifier; columns: text, label",
        lambda request: (
            ClassificationExample.from_row(row, request.text_column, request.label_column, request.classes)
            for row in benchmark_rows.read_rows(request.source)
        ),
        lambda labelled: str(labelled.text),
        lambda model, tokenizer, rows, request: classification_eval.evaluate_classification(
            model, tokenizer, rows, request.classes, request.pooling, request.windows
        ),
        ("text_column", "label_column"),
        needs_classifier=True,
    ),
}


@dataclass(frozen=True)
class EvalResult:
    """Scores on all rows and, if contamination was checked, on the uncontaminated rows.

    Attributes:
        scores: Scores on all rows.
        contaminated: Number of rows found in the training data, or None if contamination was not checked.
        clean: Scores on the uncontaminated rows; None if all rows are contaminated or contamination was not checked.
    """

    scores: ScoreSummary
    contaminated: int | None = None
    clean: ScoreSummary | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serializable dict, including ``contamination`` if it was checked."""
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


def evaluate(name: str, model: GPT, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Run an evaluation task.

    Args:
        name: Name of the task.
        model: Model with the head that the task requires, in evaluation mode.
        tokenizer: The model's tokenizer.
        request: Options for the evaluation.

    Raises:
        UserError: A row is invalid, or there are no rows.
    """
    task = EVAL_TASKS[name]
    rows = islice(task.read(request), request.limit)
    # Documents may not fit into memory, so they are kept only for a contamination check.
    kept = rows if name == "text" and request.against is None else list(rows)
    if kept == []:
        raise UserError(f"{request.source} has no rows; use a source with at least one row")
    measured = task.measure(model, tokenizer, kept, request)
    if request.against is None:
        return EvalResult(summarize(measured))
    texts = [task.text(row) for row in kept][-measured.n_rows :]  # the first rows may be few-shot examples
    dirty = find_contaminated(texts, _read_training_texts(name, request, request.against))
    return EvalResult(summarize(measured), int(np.sum(dirty)), None if dirty.all() else summarize(measured, ~dirty))


def _read_training_texts(name: str, request: EvalRequest, source: str) -> Iterable[str]:
    """Read training data as plain text, either from task-formatted rows or from documents.

    Raises:
        UserError: The source is missing, or contains neither rows nor documents.
    """
    task, same = EVAL_TASKS[name], replace(request, source=source)
    if "text_column" in task.flags:
        return iterate_training_documents(source, request.text_column)
    try:
        for _ in task.read(same):
            break
    except UserError:  # the rows are not task-formatted
        return iterate_training_documents(source)
    return map(task.text, task.read(same))


def summary_to_dict(found: ScoreSummary) -> dict[str, Any]:
    """Convert scores and their confidence intervals to a JSON-serializable dict."""
    return {
        "rows": found.rows,
        **{name: None if math.isnan(value) else value for name, value in found.metrics.items()},
        **found.extra,
        "intervals_of": "parts" if found.from_parts else "rows",
        "intervals": {name: ends and list(ends) for name, ends in found.intervals.items()},
    }
