"""A model of this package as ``lm-eval`` asks models, so that its benchmarks can be run: the extra ``[eval]``.

Nothing else here imports ``lm_eval``, and this module is imported where a benchmark is asked for.
"""

import contextlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import get_metric_aggregation
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation.generation_eval import generate_continuations
from lit_gpt_scratch.evaluation.intervals import NORMAL_QUANTILE, Measurements, ScoreSummary, summarize
from lit_gpt_scratch.evaluation.loglikelihood import ScoredSequence, compute_loglikelihoods, encode_continuation
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.tokenizer import Tokenizer

BOOTSTRAP_ITERS: Final = 100
"""For what has no formula of its own in a group of tasks."""
DEFAULT_MAX_TOKENS: Final = 256
"""Tokens of a continuation, where a task does not say how many, as in ``lm-eval``."""


class LMEvalAdapter(LM):  # type: ignore[misc]  # lm_eval has no types
    """What ``lm-eval`` asks for: log-likelihoods of continuations and of whole texts, and continuations.

    Every context begins a document, so the start of text stands before it, as with ``add_bos_token`` of theirs.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation behind its context: nats, and whether it is the greedy one.

        A context that is too long loses its beginning.
        """
        tails = [encode_continuation(self.tokenizer, *request.args) for request in requests]
        most = self.model.block_size + 1
        tails = [ScoredSequence(tail.ids[-most:], min(tail.scored, most - 1)) for tail in tails]
        return [(said.nats, said.greedy) for said in compute_loglikelihoods(self.model, tails)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of each text as a document, in windows as ``lm-eval`` lays them: nats."""
        tails, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            # The last window has as much context as there is room for, unlike those of scoring.windows.
            for read, scored in get_rolling_token_windows(ids, self.tokenizer.start_of_text, self.model.block_size, 1):
                tails.append(ScoredSequence([*read, scored[-1]], len(scored)))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, said in zip(owner, compute_loglikelihoods(self.model, tails), strict=True):
            sums[number] += said.nats
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A greedy continuation of each context, to one of its stop strings; a context too long loses its beginning.

        Raises:
            UserError: A task wants something else than the likeliest tokens.
        """
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            asked = normalize_gen_kwargs(request.args[1], DEFAULT_MAX_TOKENS)
            if asked["do_sample"]:
                raise UserError(f"argument --benchmark: {request.task_name} wants random text; that is not done")
            stop = tuple(text for text in handle_stop_sequences(asked["until"], eos=None) if text)
            alike.setdefault((asked["max_gen_toks"], stop), []).append(number)
        found = [""] * len(requests)
        for (n, stop), numbers in alike.items():
            prompts = [self._end(requests[number].args[0], n) for number in numbers]
            for number, text in zip(
                numbers, generate_continuations(self.model, self.tokenizer, prompts, n, stop), strict=True
            ):
                found[number] = text
        return found

    def _end(self, context: str, n: int) -> str:
        """As much of a context as leaves room for so many tokens, but for half of what the model holds at least."""
        room = max(self.model.block_size - n, self.model.block_size // 2) - 1
        ids, kept = self.tokenizer.encode(context), room
        while len(ids) > room:
            context = self.tokenizer.decode(ids[len(ids) - kept :])
            ids, kept = (
                self.tokenizer.encode(context),
                kept - 1,
            )  # a character cut in two may be more tokens than it was
        return context


def run_lm_eval(
    model: GPT,
    tokenizer: Tokenizer,
    names: Sequence[str],
    few_shot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
) -> dict[str, ScoreSummary]:
    """Run benchmarks of ``lm-eval``, by their names there.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        names: Tasks, or groups of tasks.
        few_shot: Examples before each question; by default as many as the task says.
        limit: Take so many rows of each task.
        include_path: A folder with YAML files of tasks beside those of the library.

    Returns:
        For each task and group its figures. Where they cannot be made of rows again, an interval is of 1.96 standard
        errors, if the library has them.

    Raises:
        UserError: There is no such task, or its data cannot be had.
    """
    # What it prints is not for standard output, which may be read by a program; nor are its processes needed.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with contextlib.redirect_stdout(sys.stderr):
        tasks = TaskManager(include_path=str(include_path) if include_path else None)
        if unknown := [name for name in names if name not in tasks.all_tasks]:
            raise UserError(f"argument --benchmark: lm-eval has no task {', '.join(unknown)}; see: lm-eval ls tasks")
        try:
            found = simple_evaluate(
                LMEvalAdapter(model, tokenizer),
                tasks=list(names),
                num_fewshot=few_shot,
                limit=limit,
                bootstrap_iters=BOOTSTRAP_ITERS,
                task_manager=tasks,
            )
        except (ConnectionError, OSError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"argument --benchmark: the data of {', '.join(names)} cannot be had: {said}") from error
    samples, counted = found.get("samples", {}), found.get("n-samples", {})
    return {
        name: _summarize_task(metrics, samples.get(name, []), counted.get(name, {}).get("effective", 0))
        for name, metrics in found["results"].items()
    }


def _summarize_task(found: dict[str, Any], samples: Sequence[dict[str, Any]], rows: int) -> ScoreSummary:
    """``acc,none`` and ``acc_stderr,none`` as a figure and its interval."""
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    for key, value in found.items():
        name, _, filter_ = key.partition(",")
        if not isinstance(value, int | float) or isinstance(value, bool) or not filter_ or name.endswith("_stderr"):
            continue
        label = name if filter_ == "none" else f"{name} ({filter_})"
        items = [sample[name] for sample in samples if sample["filter"] == filter_ and name in sample]
        error = found.get(f"{name}_stderr,{filter_}")  # N/A where none is known
        metrics[label] = float(value)
        intervals[label] = _interval_from_rows(name, items, value) or _interval_from_stderr(value, error)
    return ScoreSummary(rows, metrics, intervals, {})


def _interval_from_rows(name: str, items: Sequence[Any], value: float) -> tuple[float, float] | None:
    """As of this package's own scores, if what is known of each row makes the figure as ``lm-eval`` makes it."""
    aggregate = get_metric_aggregation(name) if items else None
    if aggregate is None or not math.isclose(aggregate(items), value):
        return None
    share = frozenset({name} if all(item in (0, 1) for item in items) else ())
    of_rows = Measurements.from_rows(
        len(items), lambda places: {name: float(aggregate([items[place] for place in places]))}, share
    )
    return summarize(of_rows).intervals[name]


def _interval_from_stderr(value: float, error: object) -> tuple[float, float] | None:
    """Of a group of tasks, say."""
    if not isinstance(error, int | float) or not math.isfinite(error):
        return None
    return value - NORMAL_QUANTILE * error, value + NORMAL_QUANTILE * error
