"""Fit a scaling law to the trials of a sweep, predict the held-out trial, and describe both in the report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property
from typing import Any, Final

import numpy as np

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.plots import Plot
from lit_gpt_scratch.sweeps.run_results import TrialResult
from lit_gpt_scratch.sweeps.scaling_law import (
    CONFIDENCE,
    LadderFit,
    MeasuredPoint,
    Prediction,
    compute_optimum,
)
from lit_gpt_scratch.sweeps.scaling_plots import plot_isoflops, plot_loss_over_compute, plot_predictions
from lit_gpt_scratch.sweeps.sweep_config import SweepConfig

SCALING_LAW_FILE: Final = "scaling_law.json"
"""File in the sweep's folder that contains the fitted law."""
RECORDED: Final = ("parameters", "tokens", "flops_per_token")
"""Values in ``summary.json`` to which a scaling law is fitted, in addition to the metric."""
TOKENS_TOLERANCE: Final = 0.02
"""Relative difference of token counts that rounding a training length to optimizer steps explains."""
N_BUDGETS: Final = 4
"""Number of compute budgets in the table of optima and in the isoFLOP plot."""
SCALING_METHOD: Final = (
    "The law is fitted to all runs except those of the held-out trial, by minimizing the Huber loss of the residuals "
    "of log L (https://arxiv.org/abs/2203.15556, approach 3). Its two terms are raised to a common power if that "
    "predicts left-out trials better (https://arxiv.org/abs/2502.08606). N counts all parameters, D all training "
    f"tokens, as the runs recorded them. Intervals are {CONFIDENCE:.0%} bootstrap intervals over the residuals of the "
    "trials; those of predictions include the noise between seeds. They assume that the law also holds beyond the "
    "measured range."
)


@dataclass(frozen=True)
class ScalingAnalysis:
    """Scaling law of a sweep, and the trial that it predicts.

    Args:
        points: Finished trials except the held-out trial, with their labels.
        problem: Reason why no law could be fitted, or an empty string.
        held_out: Held-out trial, or None if there is none or it has not finished.
        prediction: Prediction of the held-out trial, or None if it has not been made.
        started: Time in ISO 8601 at which the first run of the held-out trial started, or an empty string.
    """

    points: Mapping[str, MeasuredPoint]
    problem: str = ""
    held_out: MeasuredPoint | None = None
    prediction: Prediction | None = None
    started: str = ""

    @cached_property
    def fit(self) -> LadderFit | None:
        """Fitted law, or None if there are too few points."""
        return None if self.problem else LadderFit(tuple(self.points.values()))

    @property
    def budgets(self) -> list[float]:
        """Compute budgets in FLOPs at which optima are reported, from the smallest to the largest measured compute."""
        flops = [point.flops for point in (*self.points.values(), *([self.held_out] if self.held_out else []))]
        return [float(each) for each in np.geomspace(min(flops), max(flops), N_BUDGETS + 1)[1:]]

    @property
    def verdict(self) -> str:
        """Whether the measured loss of the held-out trial is inside the predicted interval."""
        if self.prediction is None:
            return "not predicted yet"
        if self.held_out is None:
            return "not measured yet"
        try:
            late = datetime.fromisoformat(self.started) < datetime.fromisoformat(self.prediction.predicted_at)
        except (ValueError, TypeError):  # provenance.json is missing or damaged
            return "not verified: the time at which the run started is unknown"
        if late:
            return "not a prediction: the run had started before it was made"
        return "inside" if self.prediction.low <= self.held_out.mean <= self.prediction.high else "outside"

    def describe_findings(self, metric: str) -> str:
        """Describe the law, the largest compute-optimal model, and the verdict on the held-out trial."""
        if self.fit is None:
            return f"No scaling law: {self.problem}."
        law, largest = self.fit.law, self.budgets[-1]
        best = compute_optimum(law, self.fit.cost, largest)
        text = (
            f"{metric} = {law}. "
            f"For {largest:.3g} FLOPs, {format_amount(best.parameters)} parameters and {format_amount(best.tokens)} "
            f"tokens are optimal, {best.tokens / best.parameters:.2g} tokens per parameter."
        )
        if self.prediction is None:
            return text
        text += f" Held out: predicted {self.prediction.describe()}, at {self.prediction.predicted_at}"
        if self.held_out is None:
            return f"{text}; {self.verdict}."
        n = len(self.held_out.losses)
        return f"{text}; measured {self.held_out.mean:.3f} (mean of {n} run{'s' * (n > 1)}): {self.verdict}."

    def table(self, metric: str) -> list[list[str]]:
        """Return the measured points with the values of the law, and the held-out trial with its prediction."""
        head = ["trial", "parameters", "tokens", "FLOPs", "runs", metric, "law"]
        rows = [[label, *self._cells(point)] for label, point in self.points.items()]
        if self.held_out is not None:
            rows.append(["held out", *self._cells(self.held_out)])
        return [head, *rows]

    def _cells(self, point: MeasuredPoint) -> list[str]:
        amounts = [format_amount(point.parameters), format_amount(point.tokens), f"{point.flops:.3g}"]
        fitted = f"{self.fit.law.loss(point.parameters, point.tokens):.3f}" if self.fit else ""
        return [*amounts, str(len(point.losses)), f"{point.mean:.3f}", fitted]

    def coefficient_table(self) -> list[list[str]]:
        """Return the coefficients with their intervals."""
        fit = self.fit
        if fit is None:
            return []
        [exponent] = fit.intervals(lambda law: [law.beta / (law.alpha + fit.cost.exponent * law.beta)])
        names = {**fit.coefficients(), "exponent of the optimal N over FLOPs": exponent}
        rows = [[name, f"{each.value:.4g}", f"{each.low:.4g} to {each.high:.4g}"] for name, each in names.items()]
        return [["coefficient", "value", f"{CONFIDENCE:.0%} interval"], *rows]

    def optimum_table(self) -> list[list[str]]:
        """Return the compute-optimal models with their intervals, one row per compute budget."""
        if self.fit is None:
            return []
        rows = []
        for flops in self.budgets:
            optima = self.fit.optimum(flops)
            amounts = [
                f"{format_amount(each.value)} ({format_amount(each.low)} to {format_amount(each.high)})"
                for each in (optima["parameters"], optima["tokens"])
            ]
            loss = optima["loss"]
            rows.append([f"{flops:.3g}", *amounts, f"{loss.value:.3f} ({loss.low:.3f} to {loss.high:.3f})"])
        return [["FLOPs", "optimal parameters", "optimal tokens", "loss"], *rows]

    def plots(self, metric: str) -> Iterator[Plot]:
        """Yield the plots of the law."""
        if self.fit is not None:
            points = [*self.points.values()]
            yield plot_loss_over_compute(self.fit, points, self.held_out, metric)
            yield plot_isoflops(self.fit, points, self.budgets, metric)
            yield plot_predictions(self.fit, points, self.held_out, self.prediction, metric)

    def to_json(self, metric: str, origin: str) -> str:
        """Return the fitted law, its intervals and its measured range as JSON.

        Args:
            metric: Name of the loss.
            origin: Where the runs come from, for readers of the file.
        """
        assert self.fit is not None
        points = self.points.values()
        content: dict[str, Any] = {
            "origin": origin,
            "metric": metric,
            "law": asdict(self.fit.law),
            "intervals": {name: [each.low, each.high] for name, each in self.fit.coefficients().items()},
            "cost": asdict(self.fit.cost),
            "parameters": [min(point.parameters for point in points), max(point.parameters for point in points)],
            "tokens": [min(point.tokens for point in points), max(point.tokens for point in points)],
            "n_runs": sum(len(point.losses) for point in points),
        }
        return json.dumps(content, indent=2) + "\n"


def analyze_ladder(sweep: SweepConfig, trials: Sequence[TrialResult], prediction: Prediction | None) -> ScalingAnalysis:
    """Analyze the finished trials of a sweep.

    Args:
        sweep: The parsed sweep file.
        trials: All trials.
        prediction: Prediction of the held-out trial, if it has been made.

    Raises:
        UserError: The runs do not record what a scaling law is fitted to.
    """
    points = {trial.label: point for trial in trials if (point := _measure(trial, sweep.metric))}
    held_out = next((trial for trial in trials if trial.assignment == sweep.held_out), None)
    measured = points.pop(held_out.label, None) if held_out else None
    started = min((run.started for run in held_out.runs), default="") if held_out else ""
    problem = ""
    try:
        if not points:
            raise UserError("no trial has finished")
        _ = LadderFit(tuple(points.values())).law
    except UserError as error:
        problem = str(error).removeprefix("scaling: ")
    return ScalingAnalysis(points, problem, measured, prediction, started)


def predict_held_out(sweep: SweepConfig, trials: Sequence[TrialResult]) -> Prediction:
    """Predict the mean loss of the held-out trial from all other trials.

    Its number of parameters is that of a trial with the same size, and its number of tokens that of a trial with the
    same training length.

    Raises:
        UserError: No law can be fitted, or no run with the same size or training length has finished.
    """
    held_out, lengths = sweep.held_out, sweep.length_dimensions
    assert held_out is not None
    found = {trial.number: point for trial in trials if (point := _measure(trial, sweep.metric))}
    like: dict[str, MeasuredPoint] = {}
    for what, names in (("size", sweep.vary.keys() - lengths), ("training length", lengths)):
        same = [
            found[trial.number]
            for trial in trials
            if trial.number in found and all(trial.assignment[name] == held_out[name] for name in names)
        ]
        if not same:
            raise UserError(f"scaling: no run with the {what} of the held-out trial has finished, so it is unknown")
        like[what] = same[0]
        amounts = [point.tokens for point in same]
        if what == "training length" and max(amounts) > (1 + TOKENS_TOLERANCE) * min(amounts):
            raise UserError(
                f"scaling: runs with the training length of the held-out trial have {format_amount(min(amounts))} to "
                f"{format_amount(max(amounts))} tokens, so its number of tokens is unknown; vary budget.tokens"
            )
    fit = LadderFit(tuple(found.values()))
    size, tokens = like["size"], like["training length"].tokens
    interval = fit.predict(size.parameters, tokens)
    return Prediction(
        predicted_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        parameters=size.parameters,
        tokens=tokens,
        flops=size.flops_per_token * tokens,
        loss=interval.value,
        low=interval.low,
        high=interval.high,
        confidence=CONFIDENCE,
        n_runs=sum(len(point.losses) for point in found.values()),
    )


def format_amount(value: float) -> str:
    """Format a number of parameters or tokens with three significant digits."""
    for suffix, unit in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if unit <= value < 1000 * unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def _measure(trial: TrialResult, metric: str) -> MeasuredPoint | None:
    """Return the size, training length and losses of a trial's finished runs, or None if there are none."""
    runs = [run for run in trial.runs if run.state == "finished" and metric in run.metrics]
    if not runs:
        return None
    for name in RECORDED:
        if name not in runs[0].metrics:
            raise UserError(f"scaling: the run in {runs[0].folder} does not record {name}, as language models do")
    losses = tuple(run.metrics[metric] for run in runs)
    if min(losses) <= 0:
        raise UserError(f"scaling: {metric} of the run in {runs[0].folder} is not positive, so it has no logarithm")
    parameters, tokens, flops_per_token = (runs[0].metrics[name] for name in RECORDED)
    return MeasuredPoint(parameters, tokens, flops_per_token, losses)
