"""Rows about single steps: what is not finite, what stands out, gradients, and what a step waits for."""

import math
from typing import Final

from lit_gpt_scratch.diagnostics.loss_rules import has_learned, lower_rate_advice
from lit_gpt_scratch.diagnostics.metric_history import MetricHistory
from lit_gpt_scratch.diagnostics.rule_engine import Finding
from lit_gpt_scratch.diagnostics.spike_detector import MAX_DEVIATIONS, MAX_NORM_RATIO, PATIENCE, WINDOW, SpikeDetector

GUARD_OFF: Final = 0.0
"""The guard's first mode, as ``run/guard`` has it."""
GUARD_ACTS: Final = 2.0
"""Its last."""
N_RECENT: Final = 3
"""Points whose median is what a curve is at now."""
MAX_DATA_SHARE: Final = 0.25
"""Share of a step. In healthy runs it is 0.01 to 0.04."""
EARLY_SHARE: Final = 0.25
"""Of the run. Without a warm-up, what stands out so early is its doing."""
MAX_GUARD_LINES: Final = 4
"""Lines of what the guard says of a step: numbers, where, and the hardest window."""
CHECKED_METRICS: Final = ("train/loss", "train/gradient_norm", "val/loss")


def not_finite(e: MetricHistory) -> Finding | None:
    """By the guard, or by what is logged, where that was finite before."""
    guarded = e["guard/non_finite"]
    if len(guarded) and guarded.step == e.step:
        where = _guard_report(e, "guard/non_finite/where")
        return Finding(
            where or "the loss or the gradient of the step",
            "a batch, an operation or a precision that cannot hold its numbers; the part that is named came first",
            "--trainer.detect_anomaly true" if e.fact("run/guard") == GUARD_ACTS else "--guard act",
        )
    if e.fact("run/guard") > GUARD_OFF and not math.isfinite(e.fact("train/loss")):
        return None  # the guard has said it of the step
    for name in CHECKED_METRICS:
        values = e[name].values
        if e[name].step == e.step and values and not math.isfinite(values[-1]):
            if len(values) > 1 and not math.isfinite(values[-2]):
                return None
            return Finding(
                f"{name} {values[-1]}, seen at a log point; what came first is not known without the guard",
                "a step whose gradient was not finite has reached the weights",
                "--guard act",
            )
    return None


def steps_are_skipped(e: MetricHistory) -> bool:
    """Whether what is not finite never reaches the weights."""
    return e.fact("run/guard") == GUARD_ACTS


def loss_spike(e: MetricHistory) -> Finding | None:
    """By the guard; without it, by the losses that are logged."""
    if not has_learned(e):
        return None
    act = e.fact("run/guard") == GUARD_ACTS
    cause = "a batch unlike the others; look at its documents, or clean them"
    early = e.fact("run/warmup_steps") == 0 and e.step < EARLY_SHARE * e.fact("run/steps")
    guarded = e["guard/spike"]
    if len(guarded) and guarded.step == e.step:
        said = _guard_report(e, "guard/spike/where")
        flag = "--data.cleaning+=lit_gpt_scratch.text.quality.GopherQuality" if act else "--guard act"
        above = f"{guarded.last:.1f} deviations above the median; " if guarded.last > MAX_DEVIATIONS else ""
        return Finding(above + said, *(lower_rate_advice(e) if early else (cause, flag)))
    loss = e["train/loss"]
    if e.fact("run/guard") > GUARD_OFF or loss.step != e.step or not math.isfinite(loss.last):
        return None
    watch = SpikeDetector()
    watch.losses.extend(value for value in loss.values[-WINDOW - 1 : -1] if math.isfinite(value))
    watch.norms.append(1.0)
    if watch.judge(loss.last, 1.0) is None:
        return None
    evidence = f"{watch.deviations:.1f} deviations above the median; loss {loss.last:.4g}"
    return Finding(evidence, *(lower_rate_advice(e) if early else (cause, "--guard act")))


def rewound(e: MetricHistory) -> Finding | None:
    """The guard has gone back, because leaving steps out did not help."""
    back = e["guard/rewound_to"]
    if not len(back) or back.step != e.step:
        return None
    rate = max(e["train/learning_rate"].values, default=math.nan)
    lower = f" {rate / 3:.2g}" if math.isfinite(rate) else ""
    return Finding(
        f"{PATIENCE} steps in a row were left out; back to the weights of step {back.last:.0f}",
        "no single batch's doing: a rate or a precision that the network no longer bears, or a stretch of other text",
        f"--model.optimizer.lr{lower}",
    )


def exploding_gradients(e: MetricHistory) -> Finding | None:
    """The gradient stays far larger than it was."""
    norm = e["train/gradient_norm"]
    if len(norm) < 10 + N_RECENT or not has_learned(e):
        return None
    now, before = norm.median(N_RECENT), norm.median(WINDOW, before=N_RECENT)
    if not now > MAX_NORM_RATIO * before:
        return None
    rate = max(e["train/learning_rate"].values, default=math.nan)
    return Finding(
        f"the gradient's norm is {now:.3g}, {now / before:.0f} times what it was",
        "a rate that drives the weights to where the loss is steep",
        f"--model.optimizer.lr {rate / 3:.2g}",
    )


def slow_loader(e: MetricHistory) -> Finding | None:
    """Steps wait for their batches."""
    share = e["throughput/data"]
    if len(share) < N_RECENT or not share.median(N_RECENT) > MAX_DATA_SHARE:
        return None
    processes = e.fact("run/loader_processes")
    return Finding(
        f"{share.median(N_RECENT):.0%} of a step's time goes to waiting for its batch",
        "batches are made more slowly than they are learned from",
        f"--data.num_workers {(int(processes) if math.isfinite(processes) else 0) + 2}",
    )


def _guard_report(e: MetricHistory, name: str) -> str:
    """What the guard says of the step, in one line."""
    lines = [line for line in e.text(name, e.step).replace("\n- ", "\n").splitlines() if line]
    return "; ".join(lines[:MAX_GUARD_LINES])
