"""Drawings of a report, as SVG."""

import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from lit_gpt_scratch.sweeps.html_report import Figure
from lit_gpt_scratch.sweeps.run_results import CurvePoint, RunResult
from lit_gpt_scratch.sweeps.trial import TrialResult

# Text stays text; the same figures make the same bytes.
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lit_gpt_scratch", "font.family": "sans-serif"})

MOST_CURVES = 10
"""Arms whose curves one chart can hold."""


def values(arms: Sequence[TrialResult], metric: str, baseline: TrialResult | None) -> Figure:
    """Every run as a point, every arm's mean with its confidence interval."""
    canvas, axes = _canvas(height=1.2 + 0.36 * len(arms))
    for place, arm in enumerate(reversed(arms)):
        found, whole = arm.values(metric), arm.estimate(metric)
        axes.plot(list(found.values()), [place] * len(found), "o", color="0.65", markersize=4)
        axes.errorbar(whole.mean, place, xerr=whole.half, fmt="D", color="C0", capsize=4, markersize=5)
    if baseline in arms and baseline is not None:
        axes.axvline(baseline.estimate(metric).mean, color="C3", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(arms)), [_words(arm.label) for arm in reversed(arms)])
    axes.set_xlabel(metric)
    return _figure(canvas, "values", "Grey: runs. Blue: means with 95% confidence intervals. Dashed: the baseline.")


def over_numbers(arms: Sequence[TrialResult], metric: str, dimension: str) -> Figure:
    """The metric against the one number that varied; logarithmic if that spans an order of magnitude."""
    canvas, axes = _canvas()
    points = sorted((float(arm.assignment[dimension]), arm) for arm in arms)
    for number, arm in points:
        found = arm.values(metric)
        axes.plot([number] * len(found), list(found.values()), "o", color="0.65", markersize=4)
    means = [arm.estimate(metric) for _, arm in points]
    numbers = [number for number, _ in points]
    axes.errorbar(numbers, [m.mean for m in means], [m.half or 0.0 for m in means], fmt="D-", color="C0", capsize=4)
    if numbers[0] > 0 and numbers[-1] / numbers[0] >= 10:
        axes.set_xscale("log")
    axes.set_xlabel(dimension)
    axes.set_ylabel(metric)
    return _figure(canvas, "over_numbers", f"{metric} against {dimension}: runs, means, 95% confidence intervals.")


def curves(arms: Sequence[TrialResult], metric: str, over: str) -> Figure | None:
    """The metric over a run, by ``tokens`` or ``seconds``; None where no run has two points."""
    x_of: Mapping[str, Callable[[RunResult, CurvePoint], float]] = {
        "tokens": lambda run, point: point.step * (run.tokens_per_step or 1.0),
        "seconds": lambda run, point: point.seconds,
    }
    canvas, axes = _canvas()
    drawn = False
    for place, arm in enumerate(arms[:MOST_CURVES]):
        runs = [run for run in arm.runs if len(run.curve) > 1 and (over != "tokens" or run.tokens_per_step)]
        for nth, run in enumerate(runs):
            x = [x_of[over](run, point) for point in run.curve]
            label = _words(arm.label) if nth == 0 else None
            axes.plot(x, [p.value for p in run.curve], color=f"C{place}", linewidth=1.0, alpha=0.8, label=label)
            drawn = True
    if not drawn:
        return None
    axes.set_xlabel({"tokens": "training tokens", "seconds": "seconds of the run"}[over])
    axes.set_ylabel(metric)
    axes.legend(fontsize="small", frameon=False)
    return _figure(canvas, f"curves_over_{over}", f"{metric} over {over}, a line a run.")


def importance(shares: Mapping[str, float]) -> Figure:
    """What share of the differences each dimension explains."""
    canvas, axes = _canvas(height=1.0 + 0.36 * len(shares))
    names = list(shares)[::-1]
    axes.barh(range(len(names)), [shares[name] for name in names], color="C0")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1)
    return _figure(canvas, "importance", "Share of the variance between trials (fANOVA).")


def number(arms: Sequence[TrialResult], dimension: str) -> bool:
    """Whether all settings of a dimension are numbers."""
    try:
        return all(float(arm.assignment[dimension]) == float(arm.assignment[dimension]) for arm in arms)
    except ValueError:
        return False


def _canvas(height: float = 4.2) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(8.0, height), layout="constrained")
    axes = canvas.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return canvas, axes


def _words(label: str) -> str:
    return label if len(label) <= 48 else f"{label[:45]}..."


def _figure(canvas: Canvas, name: str, caption: str) -> Figure:
    drawn = io.StringIO()
    canvas.savefig(drawn, format="svg", metadata={"Date": None})
    return Figure(name, drawn.getvalue(), caption)
