"""Rules for individual steps: non-finite values, spikes, gradient norms, and time spent waiting for data."""

import math
from typing import Final

from lit_gpt_scratch.diagnostics.loss_rules import has_learned, lower_rate_advice
from lit_gpt_scratch.diagnostics.metric_history import MetricHistory
from lit_gpt_scratch.diagnostics.rule_engine import Finding
from lit_gpt_scratch.diagnostics.spike_detector import (
    MAX_DEVIATIONS,
    MAX_NORM_RATIO,
    PATIENCE,
    WINDOW,
    SpikeDetector,
)

GUARD_OFF: Final = 0.0
"""Value of ``run/guard`` for ``--guard off``."""
GUARD_ACTS: Final = 2.0
"""Value of ``run/guard`` for ``--guard act``."""
N_RECENT: Final = 3
"""Number of most recent points whose median is used as the current value of a curve."""
MAX_DATA_SHARE: Final = 0.25
"""Fraction of the step time spent waiting for data above which a problem is reported.

The fraction is 0.01 to 0.04 in healthy runs.
"""
EARLY_SHARE: Final = 0.25
"""Fraction of the run, counted from its start, during which spikes are attributed to a missing warm-up."""
MAX_GUARD_LINES: Final = 4
"""Maximum number of lines quoted from a ``SpikeGuard`` report.

The first lines contain the loss and gradient norm, the location of non-finite values if there are any, and the window
with the highest loss.
"""
CHECKED_METRICS: Final = ("train/loss", "train/gradient_norm", "val/loss")


def not_finite(e: MetricHistory) -> Finding | None:
    """Detect NaN or infinity in a step that ``SpikeGuard`` reports, or in a logged metric.

    A metric is reported only if it is one of ``CHECKED_METRICS`` and its previous value was finite.
    """
    guarded = e["guard/non_finite"]
    if len(guarded) and guarded.step == e.step:
        return Finding(
            _guard_report(e, "guard/non_finite/where") or "the loss or the gradient of the step",
            "a batch, an operation, or a precision with too small a range; the location named first is the origin",
            "--trainer.detect_anomaly true" if e.latest("run/guard") == GUARD_ACTS else "--guard act",
        )
    if e.latest("run/guard") > GUARD_OFF and not math.isfinite(e.latest("train/loss")):
        return None  # the guard has already reported the step
    for name in CHECKED_METRICS:
        values = e[name].values
        if e[name].step == e.step and values and not math.isfinite(values[-1]):
            if len(values) > 1 and not math.isfinite(values[-2]):
                return None
            return Finding(
                f"{name} is {values[-1]}; the origin is unknown because of --guard off",
                "an optimizer step with a non-finite gradient was applied to the weights",
                "--guard act",
            )
    return None


def steps_are_skipped(e: MetricHistory) -> bool:
    """Return whether ``--guard act`` skips non-finite steps, so that they never change the weights."""
    return e.latest("run/guard") == GUARD_ACTS


def loss_spike(e: MetricHistory) -> Finding | None:
    """Detect a loss spike: a step that ``SpikeGuard`` reports as a spike.

    With ``--guard off``, a ``SpikeDetector`` searches the logged losses for spikes instead.
    """
    if not has_learned(e):
        return None
    acts = e.latest("run/guard") == GUARD_ACTS
    cause = "an unusual batch; inspect its documents, or clean them"
    is_early = e.latest("run/warmup_steps") == 0 and e.step < EARLY_SHARE * e.latest("run/steps")
    guarded = e["guard/spike"]
    if len(guarded) and guarded.step == e.step:
        report = _guard_report(e, "guard/spike/where")
        flag = "--data.cleaning+=lit_gpt_scratch.text.quality.GopherQuality" if acts else "--guard act"
        above = f"{guarded.last:.1f} standard deviations above the median; " if guarded.last > MAX_DEVIATIONS else ""
        return Finding(above + report, *(lower_rate_advice(e) if is_early else (cause, flag)))
    loss = e["train/loss"]
    if e.latest("run/guard") > GUARD_OFF or loss.step != e.step or not math.isfinite(loss.last):
        return None
    detector = SpikeDetector()
    detector.losses.extend(value for value in loss.values[-WINDOW - 1 : -1] if math.isfinite(value))
    detector.norms.append(1.0)
    if detector.classify_step(loss.last, 1.0) is None:
        return None
    evidence = f"{detector.deviations:.1f} standard deviations above the median; loss {loss.last:.4g}"
    return Finding(evidence, *(lower_rate_advice(e) if is_early else (cause, "--guard act")))


def rewound(e: MetricHistory) -> Finding | None:
    """Report that ``SpikeGuard`` has rewound the run, because skipping steps did not help."""
    rewind = e["guard/rewound_to"]
    if not len(rewind) or rewind.step != e.step:
        return None
    rate = max(e["train/learning_rate"].values, default=math.nan)
    lower = f" {rate / 3:.2g}" if math.isfinite(rate) else ""
    return Finding(
        f"{PATIENCE} consecutive steps were skipped; rewound to the weights of step {rewind.last:.0f}",
        "the learning rate is too high, the precision is too low, or a large part of the text is unusual",
        f"--model.optimizer.lr{lower}",
    )


def exploding_gradients(e: MetricHistory) -> Finding | None:
    """Detect a gradient norm that remains far larger than before."""
    norm = e["train/gradient_norm"]
    if len(norm) < 10 + N_RECENT or not has_learned(e):
        return None
    now, before = norm.median(N_RECENT), norm.median(WINDOW, before=N_RECENT)
    if not now > MAX_NORM_RATIO * before:
        return None
    rate = max(e["train/learning_rate"].values, default=math.nan)
    change = f"{now / before:.0f} times its earlier value" if before else "and was 0 before"
    return Finding(
        f"the gradient norm is {now:.3g}, {change}",
        "a learning rate so high that it drives the weights to a region where the loss is steep",
        f"--model.optimizer.lr {rate / 3:.2g}",
    )


def slow_loader(e: MetricHistory) -> Finding | None:
    """Detect steps that spend much of their time waiting for a batch."""
    share = e["throughput/data"]
    if len(share) < N_RECENT or not share.median(N_RECENT) > MAX_DATA_SHARE:
        return None
    processes = e.latest("run/loader_processes")
    return Finding(
        f"{share.median(N_RECENT):.0%} of the step time is spent waiting for the batch",
        "batches are loaded more slowly than the model processes them",
        f"--data.num_workers {(int(processes) if math.isfinite(processes) else 0) + 2}",
    )


def _guard_report(e: MetricHistory, name: str) -> str:
    """Return the report of ``SpikeGuard`` on the current step as a single line."""
    lines = [line for line in e.text(name, e.step).replace("\n- ", "\n").splitlines() if line]
    return "; ".join(lines[:MAX_GUARD_LINES])
