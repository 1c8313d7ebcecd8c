"""SVG plots of a scaling law: loss over compute, isoFLOP curves, and predicted against measured losses."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from lit_gpt_scratch.sweeps.plots import Plot, metric_label, new_figure, plot_style, save_plot
from lit_gpt_scratch.sweeps.scaling_law import CONFIDENCE, LadderFit, MeasuredPoint, Prediction, compute_optimum


def plot_loss_over_compute(
    fit: LadderFit, points: Sequence[MeasuredPoint], held_out: MeasuredPoint | None, metric: str
) -> Plot:
    """Plot the measured losses over training FLOPs, one line per size, and the fitted compute-optimal frontier.

    Args:
        fit: The fitted law.
        points: Measured points to which it was fitted.
        held_out: Measured point to which it was not fitted, if there is one.
        metric: Name of the metric.
    """
    by_size: dict[float, list[MeasuredPoint]] = defaultdict(list)
    for point in sorted(points):
        by_size[point.parameters].append(point)
    flops = [point.flops for point in (*points, *([held_out] if held_out else []))]
    budgets = np.geomspace(min(flops), max(flops), 100)
    with plot_style():
        figure, axes = new_figure()
        for index, (parameters, run) in enumerate(by_size.items()):
            label = f"{parameters / 1e6:.3g} M parameters"
            color = f"C{index}"
            axes.plot([point.flops for point in run], [point.mean for point in run], color=color, label=label)
            for point in run:
                axes.plot([point.flops] * len(point.losses), point.losses, ".", color=color)
        frontier = [compute_optimum(fit.law, fit.cost, budget).loss for budget in budgets]
        axes.plot(budgets, frontier, "k--", label="fitted compute-optimal frontier")
        if held_out is not None:
            axes.plot(
                [held_out.flops] * len(held_out.losses), held_out.losses, "*", color="black", markersize=9,
                label="held-out runs",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("training compute [FLOPs]")
        axes.set_ylabel(metric_label(metric, "minimize"))
        axes.set_title("Loss over compute", loc="left")
        axes.legend(fontsize="small", frameon=False)
        return save_plot(
            "loss_over_compute", figure, f"{metric} over training FLOPs: runs (dots) and means, one line per size."
        )


def plot_isoflops(fit: LadderFit, points: Sequence[MeasuredPoint], budgets: Sequence[float], metric: str) -> Plot:
    """Plot the loss over the number of parameters at constant compute, with the minimum of each curve.

    The runs do not have constant compute; their losses are interpolated linearly over log FLOPs between the training
    lengths of each size.

    Args:
        fit: The fitted law.
        points: Measured points.
        budgets: Compute budgets in FLOPs, one curve each.
        metric: Name of the metric.
    """
    sizes = sorted({point.parameters for point in points})
    span = np.geomspace(sizes[0] / 2, sizes[-1] * 2, 200)
    with plot_style():
        figure, axes = new_figure()
        for index, flops in enumerate(budgets):
            color = f"C{index}"
            losses = fit.law.loss(span, flops / fit.cost.flops_per_token(span))
            axes.plot(span, losses, color=color, label=f"{flops:.2g} FLOPs")
            best = compute_optimum(fit.law, fit.cost, flops)
            axes.plot([best.parameters], [best.loss], "D", color=color, label=None if index else "fitted minimum")
            for size in sizes:
                of_size = sorted(point for point in points if point.parameters == size)
                x = np.log([point.flops for point in of_size])
                if len(of_size) > 1 and x[0] <= np.log(flops) <= x[-1]:
                    y = np.interp(np.log(flops), x, [point.mean for point in of_size])
                    axes.plot([size], [y], "o", color=color, markerfacecolor="white")
        axes.plot([], [], "o", color="0.4", markerfacecolor="white", label="interpolated between measured runs")
        axes.set_xscale("log")
        axes.set_xlabel("parameters, including embeddings")
        axes.set_ylabel(metric_label(metric, "minimize"))
        axes.set_title("Loss at constant compute (isoFLOP curves)", loc="left")
        axes.legend(fontsize="small", frameon=False)
        return save_plot(
            "isoflops", figure, f"{metric} over parameters at constant training FLOPs: law (lines) and runs (circles)."
        )


def plot_predictions(
    fit: LadderFit,
    points: Sequence[MeasuredPoint],
    held_out: MeasuredPoint | None,
    prediction: Prediction | None,
    metric: str,
) -> Plot:
    """Plot the losses of the law against the measured losses, with prediction intervals.

    Args:
        fit: The fitted law.
        points: Measured points to which it was fitted.
        held_out: Measured point to which it was not fitted, if there is one.
        prediction: Prediction that was made for it.
        metric: Name of the metric.
    """
    intervals = [fit.predict(point.parameters, point.tokens) for point in points]
    with plot_style():
        figure, axes = new_figure(height=5.2)
        x = [each.value for each in intervals]
        bounds = [(each.value - each.low, each.high - each.value) for each in intervals]
        errors = np.maximum(0, bounds).T  # (2, points); a resampled law can be on one side only
        axes.errorbar(
            x, [point.mean for point in points], xerr=errors, fmt="o", capsize=3, label="fitted trials, mean over seeds"
        )
        if held_out is not None and prediction is not None:
            low, high = prediction.loss - prediction.low, prediction.high - prediction.loss
            axes.errorbar(
                [prediction.loss], [held_out.mean], xerr=[[low], [high]], fmt="*", capsize=3, color="C3", markersize=10,
                label="held-out trial, predicted before it started",
            )  # fmt: skip
        axes.axline((x[0], x[0]), slope=1.0, color="0.5", linewidth=1.0, label="predicted = measured")
        axes.set_xlabel(f"predicted {metric_label(metric, 'minimize')}")
        axes.set_ylabel(f"measured {metric_label(metric, 'minimize')}")
        axes.set_title(f"Predicted and measured loss, {CONFIDENCE:.0%} prediction intervals", loc="left")
        axes.legend(fontsize="small", frameon=False)
        return save_plot(
            "predictions", figure, f"Measured {metric} over the value of the law, with {CONFIDENCE:.0%} intervals."
        )
