"""Rows that run ``fit`` as a user would: precisions, compilation, resuming, time to a loss, RL, cost of callbacks."""

import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.acceptance.fit_probes import MS_PER_STEP, PROBE_FILE, TRACE_FILE, CallbackCost
from lit_gpt_scratch.acceptance.live_values import report
from lit_gpt_scratch.acceptance.profiler_trace import (
    COPY_TO_HOST,
    READ_SCALAR,
    SYNCHRONIZATIONS,
    count_by_step,
    find_origins,
    read_trace,
)
from lit_gpt_scratch.acceptance.row import RowContext, RowFailed, Values
from lit_gpt_scratch.checkpoint.resume_stress_test import ResumeStressTest
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.sweeps.run_process import run_module

FIT_MODULE: Final = "lit_gpt_scratch.fit"
EXPERIMENT: Final = "acceptance"
SYNCHRONIZING_CALLS: Final = {
    "cudaStreamSynchronize": SYNCHRONIZATIONS[:1],
    "other synchronizations": SYNCHRONIZATIONS[1:],
    "item()": (READ_SCALAR,),
    "copies to host": (COPY_TO_HOST,),
}
NAMED_ORIGINS: Final = 6
"""Maximum number of places that synchronize which a row names."""
SMALL_SOURCE: Final = Path(__file__).parents[1] / "diagnostics"
"""A small text that every installation has: the modules of one of this package's folders."""
SMALL_DATA: Final = (
    f"--data.source={SMALL_SOURCE}", "--data.vocab_size=300", "--data.block_size=32", "--data.batch_size=4",
    "--data.validation_share=0.2",
)  # fmt: skip
SMALL_NETWORK: Final = ("--model.gpt.n_layer=1", "--model.gpt.n_head=2", "--model.gpt.n_embd=32")
SMALL_FIT: Final = (*SMALL_DATA, *SMALL_NETWORK, "--model.compile=false", "--trainer.log_every_n_steps=2")
"""Flags for a run that takes about a second on a CPU."""
PROBES: Final = "lit_gpt_scratch.acceptance.fit_probes"
STOPPED: Final = 128 + signal.SIGTERM
"""Exit code of ``fit`` after SIGTERM, with which a row is stopped at its deadline."""
TIME_SHARES: Final = ("data", "generation", "forward", "backward", "optimizer", "rest")


def measure_fit(context: RowContext, flags: Sequence[str]) -> Iterator[Values]:
    """Run ``fit``, and yield its speed, losses, memory, and the share of each phase in the time of a step.

    Raises:
        RowFailed: ``fit`` failed, or the final training loss is not finite.
    """
    summary, seconds = run_fit(context, f"--trainer.callbacks={PROBES}.FitProgress", *flags)
    yield {"command s": seconds}
    yield from describe_summary(summary)
    if summary.get("train/loss") is None:
        raise RowFailed("the training loss is not finite")


def describe_summary(summary: dict[str, Any]) -> Iterator[Values]:
    """Yield the values of a run's ``summary.json`` that the acceptance table shows."""
    throughput = summary.get("throughput") or {}
    yield {
        "steps": summary["step"],
        "training s": summary["seconds"],
        "tokens/s": summary["tokens_per_second"],
        "train loss": summary.get("train/loss"),
        "val loss": summary.get("val/loss"),
        "peak memory GB": throughput.get("peak_memory_gigabytes"),
    }
    yield {f"MFU of {peak} peak": share for peak, share in (throughput.get("model_flops_utilisation") or {}).items()}
    yield {f"{phase} share": throughput[phase] for phase in TIME_SHARES if throughput.get(phase)}


def measure_resume(context: RowContext, flags: Sequence[str], kills: int, seed: int = 0) -> Iterator[Values]:
    """Kill ``fit`` with SIGKILL at random moments, resume it, and compare its checkpoints and curves bit by bit.

    Raises:
        RowFailed: A bit or a point of a curve differs.
    """
    folder = context.scratch / "resume"
    test = ResumeStressTest([*flags, *_common_flags(context)], folder, seed)
    found = test.run(kills, lambda: report({"kills": test.report.kills.total()}))
    yield {"kills": found.kills.total(), "bits compared": found.bits, "values that differ": len(found.differences)}
    if found.differences:
        raise RowFailed(str(found))


def measure_time_to_loss(context: RowContext, flags: Sequence[str], target: float) -> Iterator[Values]:
    """Train on the user's text until the validation loss reaches a target, and yield the training time.

    Args:
        context: Where the row runs; ``context.text`` must be set.
        flags: Flags of ``fit``.
        target: Validation loss in nats per token.

    Raises:
        RowFailed: The run ended above the target.
    """
    probe = f"--trainer.callbacks={PROBES}.TimeToLoss"
    run = start_fit(context, f"--data.source={context.text}", *flags, probe, f"{probe.split('=')[0]}.target={target}")
    found = read_json(run.path / PROBE_FILE, dict[str, Any])
    point = found["points"][-1]
    yield {
        "training s": point["seconds"],
        "training s without first step": point["seconds"] - found["first_step_seconds"],
        "steps": point["step"],
        "val loss": point["loss"],
    }
    if not found["reached"]:
        best = min(each["loss"] for each in found["points"])
        raise RowFailed(f"the validation loss did not reach {target}; the lowest was {best:.4f}")


def measure_callback_cost(
    context: RowContext, flags: Sequence[str], warmup: int, profiled: int, blocks: int, block_steps: int, trace: str
) -> Iterator[Values]:
    """Yield the share of the default callbacks in the time of a step, and the synchronizations per step.

    Args:
        context: Where the row runs.
        flags: Flags of ``fit``.
        warmup: See ``CallbackCost``.
        profiled: See ``CallbackCost``.
        blocks: See ``CallbackCost``.
        block_steps: See ``CallbackCost``.
        trace: Name of the trace that is kept in ``context.out``, without its ending.
    """
    sizes = {"warmup": warmup, "profiled": profiled, "blocks": blocks, "block_steps": block_steps}
    probe = f"--trainer.callbacks={PROBES}.CallbackCost"
    settings = [f"--trainer.callbacks.{name}={value}" for name, value in sizes.items()]
    run = start_fit(context, probe, *settings, *flags, f"--trainer.max_steps={CallbackCost(**sizes).steps}")
    found = read_json(run.path / PROBE_FILE, dict[str, Any])
    with_them, without = (found["seconds_per_step"][name] for name in ("with", "without"))
    yield {
        MS_PER_STEP[0]: 1000 * with_them,
        MS_PER_STEP[1]: 1000 * without,
        "share of callbacks": (with_them - without) / with_them,
    }
    kept = context.out / f"{trace}.json.gz"
    shutil.copyfile(run.path / TRACE_FILE, kept)
    yield {"trace": kept.name, "trace MB": kept.stat().st_size / 1e6}
    yield from describe_synchronizations(kept, found["log_every_n_steps"], found["first_step_without"])


def describe_synchronizations(trace: Path, log_every_n_steps: int, first_step_without: int) -> Iterator[Values]:
    """Yield the number of synchronizations and of copies to the host, and where steps with callbacks synchronize.

    Args:
        trace: Trace of a run with ``CallbackCost``.
        log_every_n_steps: Interval of logged steps. The step before each of its multiples is logged.
        first_step_without: First step without the other callbacks.
    """
    events = read_trace(trace)
    counts = count_by_step(events)
    for kind in ("ordinary", "logged"):
        steps = [step for step in counts if bool((step + 1) % log_every_n_steps) == (kind == "ordinary")]
        own = [step for step in steps if step < first_step_without]
        for label, names in SYNCHRONIZING_CALLS.items():
            with_them, without = (
                sum(counts[step][name] for step in part for name in names) / len(part) if part else None
                for part in (own, [step for step in steps if step >= first_step_without])
            )
            if with_them is not None:
                yield {f"{label} per {kind} step": with_them}
            if with_them is not None and without is not None:
                yield {f"{label} of callbacks per {kind} step": with_them - without}
        for label, names in {"synchronizations": SYNCHRONIZATIONS, "item()": (READ_SCALAR,)}.items():
            if origins := find_origins(events, names, own).most_common(NAMED_ORIGINS):
                text = ", ".join(f"{origin} {count / len(own):.3g}" for origin, count in origins)
                yield {f"{label} per {kind} step from": text}


# Runs


def run_fit(context: RowContext, *flags: str) -> tuple[dict[str, Any], float]:
    """Run ``fit``; return its ``summary.json`` and the duration of the command in seconds, without imports."""
    began = time.monotonic()
    run = start_fit(context, *flags)
    return read_json(run.path / "summary.json", dict[str, Any]), time.monotonic() - began


def start_fit(context: RowContext, *flags: str) -> RunFolder:
    """Run ``fit`` as the main program of this process, which belongs to the row; return the folder of its run.

    A new interpreter would import the libraries again, which takes many seconds in each row.

    Raises:
        RowFailed: ``fit`` failed; the message is its error.
        SystemExit: ``fit`` was stopped by SIGTERM.
    """
    runs = context.scratch / "runs" / str(time.monotonic_ns())
    arguments = [f"--runs={runs}", f"--experiment={EXPERIMENT}", *_common_flags(context), *flags]
    sys.argv = [FIT_MODULE, *arguments]
    try:
        run_module(FIT_MODULE)
    except SystemExit as end:
        if end.code == STOPPED:  # not a failure
            raise
        if end.code:
            raise RowFailed(f"fit failed with exit code {end.code}: {end.__context__ or 'see the log'}") from end
    return RunFolder(runs / EXPERIMENT / "version_0")


def _common_flags(context: RowContext) -> list[str]:
    """Return the flags for the device, and for the cache of token stores, which the rows share."""
    accelerator = "gpu" if context.on_cuda else "cpu"
    cache = context.scratch / "cache"
    return [f"--trainer.accelerator={accelerator}", "--trainer.devices=1", f"--data.cache={cache}"]
