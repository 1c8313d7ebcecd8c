"""SVG plots for sweep reports; matplotlib is imported only when a plot is drawn."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from lit_gpt_scratch.sweeps.run_results import CurvePoint, RunResult, TrialResult
from lit_gpt_scratch.sweeps.statistics import WITHIN_NOISE, Comparison, paired_differences
from lit_gpt_scratch.terminal_output import escape_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",  # keep text as text instead of converting it to paths
    "svg.hashsalt": "lit_gpt_scratch",  # makes the output deterministic
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
}
UNITS: Final = {"bits_per_byte": "bits per byte", "loss": "nats", "seconds": "s", "tokens_per_second": "tokens per s"}
"""Units of metrics, keyed by the last component of the metric's name."""
COLORS: Final = {"better": "C0", "worse": "C3", WITHIN_NOISE: "0.45"}
MARKER_LABELS: Final = {
    "better": "better (p < 0.05 after Holm's correction)",
    "worse": "worse (p < 0.05 after Holm's correction)",
    WITHIN_NOISE: "within noise (p ≥ 0.05 after Holm's correction)",
}
MAX_CURVES: Final = 10
"""Maximum number of trials in a plot of training curves; if there are more, only the best trials are shown."""
OUTLIER_RATIO: Final = 5.0
"""Maximum ratio between the distances of two successive trials from 0; trials beyond a larger gap are clipped."""


@dataclass(frozen=True)
class Plot:
    """SVG plot with a file name (without suffix) and a caption."""

    name: str
    svg: str
    caption: str


def plot_differences(
    trials: Sequence[TrialResult],
    baseline: TrialResult,
    comparisons: Mapping[int, Comparison],
    metric: str,
    direction: str,
) -> Plot:
    """Plot paired differences from the baseline, one row per trial, with 95% confidence intervals.

    Args:
        trials: Finished trials, best first.
        baseline: Baseline trial, drawn at zero.
        comparisons: Comparisons with the baseline, keyed by trial number.
        metric: Name of the metric.
        direction: ``minimize`` or ``maximize``.
    """
    shown = [trial for trial in trials if trial is not baseline and comparisons[trial.number].difference is not None]
    limits = robust_limits([_extent(trial, baseline, comparisons, metric) for trial in shown])
    with plot_style():
        figure, axes = new_figure(height=2.0 + 0.4 * len(shown))
        axes.axvline(0.0, color="black", linewidth=0.8)
        for y, trial in enumerate(reversed(shown)):
            comparison = comparisons[trial.number]
            seeds = list(paired_differences(trial.values(metric), baseline.values(metric)).values())
            clipped = _draw_difference(axes, comparison, seeds, y, limits, horizontal=True)
            text = f"{comparison.difference}  {comparison.verdict}{' (off the axis)' if clipped else ''}"
            axes.annotate(
                text, (1.0, y), xycoords=("axes fraction", "data"), xytext=(10, 0), textcoords="offset points",
                va="center", fontsize="small",
            )  # fmt: skip
        axes.set_xlim(limits)
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_yticks(range(len(shown)), [_shorten(trial.label) for trial in reversed(shown)])
        axes.set_xlabel(f"difference in {metric_label(metric, direction)}")
        axes.set_title(f"Difference from the baseline ({_shorten(baseline.label)}), paired by seed", loc="left")
        _add_legend(figure, axes)
        caption = "Per-seed differences from the baseline (dots), their means and 95% confidence intervals."
        return save_plot("differences", figure, caption)


def plot_differences_over(
    trials: Sequence[TrialResult],
    baseline: TrialResult,
    comparisons: Mapping[int, Comparison],
    metric: str,
    direction: str,
    dimension: str,
) -> Plot:
    """Plot paired differences from the baseline against a numeric search dimension.

    The x axis is logarithmic if the settings are positive and span at least a factor of 10.

    Args:
        trials: Finished trials.
        baseline: Baseline trial, drawn at zero.
        comparisons: Comparisons with the baseline, keyed by trial number.
        metric: Name of the metric.
        direction: ``minimize`` or ``maximize``.
        dimension: Name of the search dimension on the x axis.
    """
    shown = [trial for trial in trials if trial is not baseline and comparisons[trial.number].difference is not None]
    limits = robust_limits([_extent(trial, baseline, comparisons, metric) for trial in shown])
    means = {float(baseline.assignment[dimension]): 0.0}
    with plot_style():
        figure, axes = new_figure(height=5.2)
        axes.axhline(0.0, color="black", linewidth=0.8)
        for trial in shown:
            comparison, x = comparisons[trial.number], float(trial.assignment[dimension])
            assert comparison.difference is not None
            means[x] = comparison.difference.mean
            seeds = list(paired_differences(trial.values(metric), baseline.values(metric)).values())
            if _draw_difference(axes, comparison, seeds, x, limits, horizontal=False):
                edge = limits[means[x] > 0]
                axes.annotate(
                    f"{comparison.difference}\n(off the axis)", (x, edge), xytext=(6, 0), textcoords="offset points",
                    va="center", fontsize="small",
                )  # fmt: skip
        numbers = sorted(means)
        axes.plot(numbers, [means[x] for x in numbers], color="0.7", linewidth=1.0, zorder=0)
        axes.plot([float(baseline.assignment[dimension])], [0.0], "s", color="black", label="baseline")
        if numbers[0] > 0 and numbers[-1] / numbers[0] >= 10:
            axes.set_xscale("log")
        axes.set_ylim(limits)
        axes.set_xlabel(_plain(dimension))
        axes.set_ylabel(f"difference in {metric_label(metric, direction)}".replace(" [", "\n["))
        axes.set_title(f"Difference from the baseline ({_shorten(baseline.label)}), paired by seed", loc="left")
        _add_legend(figure, axes)
        caption = (
            f"Per-seed differences from the baseline (dots) over {dimension}, their means and 95% confidence intervals."
        )
        return save_plot("differences", figure, caption)


def plot_curves(trials: Sequence[TrialResult], metric: str, direction: str, over: str) -> Plot | None:
    """Plot the metric during training, one line per run; return None if no run has at least two values.

    Args:
        trials: Trials to show, best first; at most ``MAX_CURVES`` are shown.
        metric: Name of the metric.
        direction: ``minimize`` or ``maximize``.
        over: Quantity on the x axis: ``tokens`` or ``seconds``.
    """
    x_of: dict[str, Callable[[RunResult, CurvePoint], float]] = {
        "tokens": lambda run, point: point.step * (run.tokens_per_step or 1.0),
        "seconds": lambda run, point: point.seconds,
    }
    runs = {
        trial.number: [run for run in trial.runs if len(run.curve) > 1 and (over != "tokens" or run.tokens_per_step)]
        for trial in trials
    }
    drawable = [trial for trial in trials if runs[trial.number]]
    if not drawable:
        return None
    shown = drawable[:MAX_CURVES]
    values = {trial.number: [point.value for run in runs[trial.number] for point in run.curve] for trial in shown}
    pick: Callable[..., float] = min if direction == "minimize" else max
    best = pick(value for each in values.values() for value in each)
    limits = robust_limits([(min(each) - best, max(each) - best) for each in values.values()])
    low, high = (best + limit for limit in limits)
    with plot_style():
        from matplotlib.ticker import EngFormatter

        figure, axes = new_figure()
        for index, trial in enumerate(shown):
            label = _shorten(trial.label)
            furthest = max(values[trial.number], key=lambda value: abs(value - best))
            if not low <= furthest <= high:
                label += f" (off the axis: {furthest:.4g})"
            for nth, run in enumerate(runs[trial.number]):
                x = [x_of[over](run, point) for point in run.curve]
                y = [point.value for point in run.curve]
                axes.plot(x, y, color=f"C{index}", linewidth=1.0, alpha=0.8, label=None if nth else label)
        axes.set_ylim(low, high)
        axes.set_xlabel({"tokens": "training tokens", "seconds": "time since the start of training [s]"}[over])
        axes.set_ylabel(metric_label(metric, direction))
        if over == "tokens":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        count = "" if len(shown) == len(drawable) else f", best {len(shown)} of {len(drawable)} trials"
        axes.set_title(f"{_plain(metric)} over {over}{count}", loc="left")
        axes.legend(fontsize="small", frameon=False)
        return save_plot(f"curves_over_{over}", figure, f"{metric} over {over}, one line per run.")


def plot_importance(shares: Mapping[str, float]) -> Plot:
    """Draw a bar plot of the fraction of the variance between trials that each search dimension explains."""
    with plot_style():
        figure, axes = new_figure(height=1.4 + 0.36 * len(shares))
        names = list(shares)[::-1]
        axes.barh(range(len(names)), [shares[name] for name in names], color="C0")
        axes.set_yticks(range(len(names)), [_plain(name) for name in names])
        axes.set_xlim(0, 1)
        axes.set_xlabel("fraction of the variance between trials (fANOVA)")
        axes.set_title("Importance of each dimension", loc="left")
        return save_plot(
            "importance", figure, "Fraction of the variance between trials explained by each dimension (fANOVA)."
        )


def is_numeric(trials: Sequence[TrialResult], dimension: str) -> bool:
    """Return whether all settings of a search dimension are numeric."""
    try:
        return all(float(trial.assignment[dimension]) == float(trial.assignment[dimension]) for trial in trials)
    except ValueError:
        return False


def robust_limits(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return axis limits that include 0 and all ranges except outliers.

    The distance of a range from 0 is that of its farther endpoint. If a range is more than ``OUTLIER_RATIO`` times as
    far from 0 as the next closer range, this range and all ranges beyond it are outliers. At most half of the ranges
    can be outliers.

    Args:
        ranges: Minimum and maximum value of each trial.
    """
    reaches = sorted(max(-low, high) for low, high in ranges)
    limit = reaches[-1]
    for index in range((len(reaches) + 1) // 2, len(reaches)):
        if reaches[index] > OUTLIER_RATIO * reaches[index - 1] > 0:
            limit = reaches[index - 1]
            break
    kept = [(low, high) for low, high in ranges if max(-low, high) <= limit]
    low, high = min(0.0, *(low for low, _ in kept)), max(0.0, *(high for _, high in kept))
    margin = 0.08 * (high - low) or 0.01
    return low - margin, high + margin


def metric_label(metric: str, direction: str) -> str:
    """Return an axis label with the metric, its unit, and whether lower or higher values are better."""
    unit = UNITS.get(metric.rpartition("/")[2])
    better = "lower is better" if direction == "minimize" else "higher is better"
    return f"{_plain(metric)}{f' [{unit}]' if unit else ''}, {better}"


def _extent(
    trial: TrialResult, baseline: TrialResult, comparisons: Mapping[int, Comparison], metric: str
) -> tuple[float, float]:
    """Return the minimum and maximum of the values drawn for a trial, including its confidence interval."""
    difference = comparisons[trial.number].difference
    assert difference is not None
    half_width = difference.half_width or 0.0
    seeds = paired_differences(trial.values(metric), baseline.values(metric)).values()
    return min(difference.mean - half_width, *seeds), max(difference.mean + half_width, *seeds)


def _draw_difference(
    axes: "Axes",
    comparison: Comparison,
    seeds: Sequence[float],
    position: float,
    limits: tuple[float, float],
    horizontal: bool,
) -> bool:
    """Draw the differences of a trial as dots, one per seed, and their mean with its confidence interval.

    The marker of the mean is filled if the difference is significant. A mean outside the limits is drawn as an arrow at
    the edge of the axis.

    Returns:
        Whether the mean is outside the limits.
    """
    assert comparison.difference is not None
    mean, half_width = comparison.difference.mean, comparison.difference.half_width
    color = COLORS.get(comparison.verdict, "0.45")
    at = [position] * len(seeds)
    x, y = (list(seeds), at) if horizontal else (at, list(seeds))
    axes.plot(x, y, "o", color="0.7", markersize=4, label="one seed")
    point, error = ((mean, position), "xerr") if horizontal else ((position, mean), "yerr")
    style: dict[str, Any] = {
        error: half_width,
        "color": color,
        "markerfacecolor": color if comparison.significant else "white",
        "label": f"mean ± 95% CI: {MARKER_LABELS.get(comparison.verdict, comparison.verdict)}",
    }
    axes.errorbar(*point, fmt="D", capsize=4, markersize=6, **style)
    low, high = limits
    if low <= mean <= high:
        return False
    edge = high if mean > high else low
    arrow = {(True, high): ">", (True, low): "<", (False, high): "^", (False, low): "v"}[horizontal, edge]
    x, y = ([edge], [position]) if horizontal else ([position], [edge])
    axes.plot(x, y, marker=arrow, color=color, markersize=8, clip_on=False)
    return True


def _add_legend(figure: "Figure", axes: "Axes") -> None:
    """Add a legend below the axes with one entry per label."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower left", ncols=1, fontsize="small", frameon=False)


def plot_style() -> Any:
    """Return a context manager that sets the style of figures."""
    import matplotlib as mpl

    return mpl.rc_context(STYLE)  # type: ignore[arg-type]  # rc_context types its keys as a Literal


def new_figure(height: float = 4.2) -> "tuple[Figure, Axes]":
    """Build a figure with one set of axes; the height is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, height), layout="constrained")
    return figure, figure.add_subplot()


def _shorten(label: str) -> str:
    return _plain(label if len(label) <= 48 else f"{label[:45]}...")


def _plain(text: str) -> str:
    """Escape control characters, which are invalid in SVG, and ``$``, which matplotlib would parse as math."""
    return escape_line(text).replace("$", r"\$")


def save_plot(name: str, figure: "Figure", caption: str) -> Plot:
    """Render a figure as SVG."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})  # for deterministic output
    return Plot(name, svg.getvalue(), caption)
