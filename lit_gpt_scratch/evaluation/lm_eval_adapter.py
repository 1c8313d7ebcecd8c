"""Run ``lm-eval`` benchmarks on models of this package; requires the ``[eval]`` extra.

No other module imports ``lm_eval``, and this module is only imported to run a benchmark.
"""

import contextlib
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
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

log = logging.getLogger(__name__)

BOOTSTRAP_ITERS: Final = 100
"""Number of bootstrap iterations with which ``lm-eval`` estimates standard errors that have no closed form.

The estimates are used only for metrics whose confidence intervals cannot be computed from the rows.
"""
DEFAULT_MAX_TOKENS: Final = 256
"""Maximum number of new tokens per continuation for tasks that do not set a limit, as in ``lm-eval``."""


class LMEvalAdapter(LM):  # type: ignore[misc]  # lm_eval has no types
    """Adapter that implements the model interface of ``lm-eval`` for a language model of this package.

    Every context is treated as the beginning of a document, so the start-of-text token is prepended, as with the
    option ``add_bos_token`` of ``lm-eval``.

    Args:
        model: The language model, in evaluation mode.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Compute the log-likelihood in nats of each continuation, and whether it equals the greedy continuation.

        Contexts that are too long are truncated from the left. A continuation that is longer than the model's context,
        which ``lm-eval`` itself does not support, is scored in windows (see ``split_continuation``), so that all of its
        tokens are scored; a warning is logged once per task.
        """
        sequences, owner = [], []
        for number, request in enumerate(requests):
            windows = list(
                split_continuation(encode_continuation(self.tokenizer, *request.args), self.model.block_size)
            )
            sequences += windows
            owner += [number] * len(windows)
        tasks = (requests[number].task_name for number, count in Counter(owner).items() if count > 1)
        for name, count in Counter(tasks).items():
            log.warning(
                "%s: %d continuations are longer than the context of %d tokens; they are scored in windows, in which a "
                "token's context is only the preceding %d to %d tokens",
                name, count, self.model.block_size, self.model.block_size // 2, self.model.block_size,
            )  # fmt: skip
        nats, greedy = [0.0] * len(requests), [True] * len(requests)
        for number, score in zip(owner, compute_loglikelihoods(self.model, sequences), strict=True):
            nats[number] += score.nats
            greedy[number] &= score.greedy
        return list(zip(nats, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Compute the log-likelihood in nats of each document, which is split into windows as in ``lm-eval``."""
        sequences, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            # Unlike with perplexity.split_into_windows, the last window has as much context as fits.
            for read, scored in get_rolling_token_windows(ids, self.tokenizer.start_of_text, self.model.block_size, 1):
                sequences.append(ScoredSequence([*read, scored[-1]], len(scored)))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, score in zip(owner, compute_loglikelihoods(self.model, sequences), strict=True):
            sums[number] += score.nats
        return sums

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate a greedy continuation of each context, up to the first stop string.

        Contexts that are too long are truncated from the left.

        Raises:
            UserError: A task requires random sampling.
        """
        by_settings: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            settings = normalize_gen_kwargs(request.args[1], DEFAULT_MAX_TOKENS)
            if settings["do_sample"]:
                raise UserError(
                    f"argument --benchmark: {request.task_name} requires random sampling, but only greedy decoding is "
                    "supported; choose another task"
                )
            stop = tuple(text for text in handle_stop_sequences(settings["until"], eos=None) if text)
            by_settings.setdefault((settings["max_gen_toks"], stop), []).append(number)
        found = [""] * len(requests)
        for (n, stop), numbers in by_settings.items():
            prompts = [self._truncate_context(requests[number].args[0], n) for number in numbers]
            for number, text in zip(
                numbers, generate_continuations(self.model, self.tokenizer, prompts, n, stop), strict=True
            ):
                found[number] = text
        return found

    def _truncate_context(self, context: str, n: int) -> str:
        """Truncate a prompt from the left so that ``n`` new tokens fit into the context.

        At least half of the context is reserved for the prompt, even if the new tokens then do not fit.
        """
        limit = max(self.model.block_size - n, self.model.block_size // 2) - 1
        ids, kept = self.tokenizer.encode(context), limit
        while len(ids) > limit:
            context = self.tokenizer.decode(ids[len(ids) - kept :])
            # A character that is split at the boundary may be encoded as more tokens than before. If so, retry with
            # one token fewer.
            ids, kept = self.tokenizer.encode(context), kept - 1
        return context


def split_continuation(sequence: ScoredSequence, block_size: int) -> Iterator[ScoredSequence]:
    """Split a sequence into windows that fit into the context, so that each token of the continuation is scored once.

    If the continuation fits into the context, there is one window, and the preceding text is truncated from the left. A
    longer continuation is split into parts of half the context length. Each part is preceded by as many tokens as fit:
    at least half the context length, except at the beginning of the text. The log-likelihood of the continuation is the
    sum of the log-likelihoods of all windows.
    """
    most = block_size + 1  # the last token is not an input
    first, end = len(sequence.ids) - sequence.n_scored, len(sequence.ids)
    stride = sequence.n_scored if sequence.n_scored <= block_size else max(1, block_size // 2)
    for start in range(first, end, stride):
        stop = min(start + stride, end)
        yield ScoredSequence(sequence.ids[max(0, stop - most) : stop], stop - start)


def run_lm_eval(
    model: GPT,
    tokenizer: Tokenizer,
    names: Sequence[str],
    few_shot: int | None = None,
    limit: int | None = None,
    include_path: Path | None = None,
) -> dict[str, ScoreSummary]:
    """Run ``lm-eval`` benchmarks.

    Args:
        model: The language model, in evaluation mode.
        tokenizer: The model's tokenizer.
        names: Names of tasks or task groups.
        few_shot: Number of few-shot examples; None uses the default of each task.
        limit: Maximum number of rows per task; None uses all rows.
        include_path: Folder with YAML files that define additional tasks.

    Returns:
        The metrics of each task and task group, keyed by the name of the task or group. If a metric cannot be
        recomputed from the rows, its confidence interval is the metric +/- 1.96 times the standard error that
        ``lm-eval`` reports, or None if ``lm-eval`` reports no standard error.

    Raises:
        UserError: A task does not exist, or its data cannot be loaded.
    """
    # Keep lm-eval's output off standard output, which a program may parse. Worker processes are not needed.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with contextlib.redirect_stdout(sys.stderr):
        tasks = TaskManager(include_path=str(include_path) if include_path else None)
        if unknown := [name for name in names if name not in tasks.all_tasks]:
            raise UserError(
                f"argument --benchmark: lm-eval has no task {', '.join(unknown)}; list all tasks with: lm-eval ls tasks"
            )
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
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"argument --benchmark: cannot load the data of {', '.join(names)}: {reason}; "
                "check the network connection"
            ) from error
    samples, counted = found.get("samples", {}), found.get("n-samples", {})
    return {
        name: _summarize_task(metrics, samples.get(name, []), counted.get(name, {}).get("effective", 0))
        for name, metrics in found["results"].items()
    }


def _summarize_task(found: dict[str, Any], samples: Sequence[dict[str, Any]], rows: int) -> ScoreSummary:
    """Collect the metrics of a task or task group, such as ``acc,none``, with their confidence intervals.

    An interval is computed from the rows or, if the rows yield a different metric value than the reported one, from the
    standard error, such as ``acc_stderr,none``.
    """
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float] | None] = {}
    for key, value in found.items():
        name, _, filter_ = key.partition(",")
        if not isinstance(value, int | float) or isinstance(value, bool) or not filter_ or name.endswith("_stderr"):
            continue
        label = name if filter_ == "none" else f"{name} ({filter_})"
        items = [sample[name] for sample in samples if sample["filter"] == filter_ and name in sample]
        error = found.get(f"{name}_stderr,{filter_}")  # "N/A" if unknown
        metrics[label] = float(value)
        intervals[label] = _interval_from_rows(name, items, value) or _interval_from_stderr(value, error)
    return ScoreSummary(rows, metrics, intervals, {})


def _interval_from_rows(name: str, items: Sequence[Any], value: float) -> tuple[float, float] | None:
    """Compute an interval with ``summarize``; return None if aggregating the rows does not yield ``value``."""
    aggregate = get_metric_aggregation(name) if items else None
    if aggregate is None or not math.isclose(aggregate(items), value):
        return None
    share = frozenset({name} if all(item in (0, 1) for item in items) else ())
    of_rows = Measurements.from_rows(
        len(items), lambda indices: {name: float(aggregate([items[index] for index in indices]))}, share
    )
    return summarize(of_rows).intervals[name]


def _interval_from_stderr(value: float, error: object) -> tuple[float, float] | None:
    """Compute a confidence interval with the normal approximation; return None if the standard error is unknown."""
    if not isinstance(error, int | float) or not math.isfinite(error):
        return None
    return value - NORMAL_QUANTILE * error, value + NORMAL_QUANTILE * error
