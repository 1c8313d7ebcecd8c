"""Sweep reports in HTML and Markdown, with plots and a CSV file that has one row per run."""

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.fit_command import format_command
from lit_gpt_scratch.sweeps.plots import (
    Plot,
    is_numeric,
    plot_curves,
    plot_differences,
    plot_differences_over,
    plot_importance,
)
from lit_gpt_scratch.sweeps.run_results import ENVIRONMENT_PARTS, TrialResult, format_setting, rank_finished
from lit_gpt_scratch.sweeps.scaling_report import SCALING_LAW_FILE, SCALING_METHOD, ScalingAnalysis
from lit_gpt_scratch.sweeps.statistics import WITHIN_NOISE, Comparison, compare_to_baseline
from lit_gpt_scratch.terminal_output import escape_terminal, redact
from lit_gpt_scratch.text.atomic_files import write_atomically
from lit_gpt_scratch.text.markdown import Markdown, escape_markdown, format_compact_table, markdown_code_block

MIN_SHOWN_P: Final = 0.0001
"""Smallest p-value that is reported as a number; smaller p-values are reported as "< 0.0001"."""


@dataclass(frozen=True)
class SweepReport:
    """Report on the trials of a sweep, or on a comparison of existing runs.

    Args:
        title: Title of the document.
        question: Question that the sweep answers.
        metric: Metric for comparing trials.
        direction: Whether to ``minimize`` or ``maximize`` the metric.
        trials: All trials, whether finished or not.
        baseline: Trial with which the other trials are compared, or None if it does not exist yet.
        setup: Descriptions of varied flags, fixed flags, budget and other settings, keyed by name.
        command: Command that reproduces the sweep.
        importance: Fraction of the variance between trials that each search dimension explains, keyed by its name.
        scaling: Scaling law of the trials; it replaces the comparison with the baseline.
    """

    title: str
    question: str
    metric: str
    direction: str
    trials: list[TrialResult]
    baseline: TrialResult | None
    setup: Mapping[str, str]
    command: str
    importance: Mapping[str, float] = field(default_factory=dict)
    scaling: ScalingAnalysis | None = None

    def write(self, folder: Path) -> Path:
        """Write ``report.html``, ``report.md`` with its plots, and ``results.csv``, each atomically.

        With a scaling law, also write ``scaling_law.json``.

        Returns:
            The path of ``report.html``.

        Raises:
            UserError: The folder is not writable.
        """
        files = {
            "results.csv": self.results_csv(),
            "report.md": self.markdown(),
            **{f"{plot.name}.svg": plot.svg for plot in self.plots},
            "report.html": self.html(),
        }
        if self.scaling is not None and self.scaling.fit is not None:
            files[SCALING_LAW_FILE] = self.scaling.to_json(self.metric, f"the runs of {self.command}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                write_atomically(folder / name, content)
        except OSError as error:
            raise UserError(
                f"cannot write the report to {folder}: {error.strerror}; check the permissions and the free disk space"
            ) from error
        return folder / "report.html"

    def results_csv(self) -> str:
        """Return the results as a CSV table with one row per run."""
        dimensions = list(self.trials[0].assignment) if self.trials else []
        runs = [(trial, run) for trial in self.trials for run in trial.runs]
        metrics = dict.fromkeys([self.metric, *(name for _, run in runs for name in run.metrics)])
        content = io.StringIO()
        table = csv.writer(content, lineterminator="\n")
        table.writerow(["trial", *dimensions, "seed", "state", *metrics, "reason", "folder"])
        for trial, run in runs:
            settings = [trial.assignment[name] for name in dimensions]
            values = [run.metrics.get(name, "") for name in metrics]
            table.writerow([trial.number, *settings, run.seed, run.state, *values, redact(run.reason), run.folder])
        return content.getvalue()

    def markdown(self) -> str:
        """Return the report as Markdown, which links to plot files in the same folder."""
        return _render("report.md.jinja", self._context, _escape_markdown)

    def html(self) -> str:
        """Return the report as a single HTML page without scripts or external resources."""
        return _render("report.html.jinja", self._context, _escape_controls)

    @cached_property
    def ranked(self) -> list[TrialResult]:
        """Finished trials, best first."""
        return rank_finished(self.trials, self.metric, self.direction)

    @cached_property
    def comparisons(self) -> dict[int, Comparison]:
        """Comparisons with the baseline, keyed by trial number, or an empty dict if the baseline has not finished."""
        if self.baseline not in self.ranked or self.baseline is None or self.scaling is not None:
            return {}
        values = {trial.number: trial.values(self.metric) for trial in self.ranked if trial is not self.baseline}
        return compare_to_baseline(values, self.baseline.values(self.metric), self.direction)

    @cached_property
    def plots(self) -> list[Plot]:
        """Plots of differences from the baseline, training curves and importance; plots without data are omitted."""
        drawn: list[Plot | None] = [] if self.scaling is None else list(self.scaling.plots(self.metric))
        baseline = self.baseline
        if baseline is not None and any(comparison.difference for comparison in self.comparisons.values()):
            data = self.ranked, baseline, self.comparisons, self.metric, self.direction
            dimension, *others = baseline.assignment
            if len(self.ranked) > 2 and not others and is_numeric(self.ranked, dimension):
                drawn.append(plot_differences_over(*data, dimension))
            else:
                drawn.append(plot_differences(*data))
        if self.ranked:
            pruned = [trial for trial in self.trials if trial.state == "pruned"]
            for over in ("tokens", "seconds"):
                drawn.append(plot_curves([*self.ranked, *pruned], self.metric, self.direction, over))
        if self.importance:
            drawn.append(plot_importance(self.importance))
        return [plot for plot in drawn if plot is not None]

    @cached_property
    def _context(self) -> dict[str, Any]:
        """Variables of the report templates."""
        best = self.ranked[0] if self.ranked and self.scaling is None else None
        failures = self.describe_failures()
        if self.scaling is None:
            findings = self._describe_findings()
            comparison = [self._comparison_head(), *(self._comparison_row(trial) for trial in self.ranked)]
            method = self._describe_method()
        else:
            findings = self.scaling.describe_findings(self.metric)
            comparison, method = self.scaling.table(self.metric), SCALING_METHOD
        unfinished = sum(trial.state == "unfinished" for trial in self.trials)
        return {
            "title": self.title,
            "question": self.question,
            "findings": f"{findings} {failures}".rstrip(),
            "comparison": comparison,
            "method": method,
            "coefficients": self.scaling.coefficient_table() if self.scaling else [],
            "optima": self.scaling.optimum_table() if self.scaling else [],
            "diagnostics": list(summarize_diagnostics(self.trials)),
            "setup": list(self.setup.items()),
            "command": self.command,
            "plots": self.plots,
            "importance": [(name, f"{share:.2f}") for name, share in self.importance.items()],
            "best_commands": "\n".join(format_command(best.flags, run.seed) for run in best.runs) if best else "",
            "unfinished_rows": [
                (str(trial.number), trial.label, str(run.seed), run.state, run.reason)
                for trial in self.trials
                for run in trial.runs
                if run.state != "finished"
            ],
            "unfinished": f"{unfinished} unfinished trial{'s' * (unfinished > 1)}; run the command again to resume."
            if unfinished
            else "",
            "environment": list(_summarize_environment(self.trials)),
        }

    def _describe_findings(self) -> str:
        if not self.ranked:
            return "No trial has finished."
        best = self.ranked[0]
        text = f"Best mean: {best.label}, {self.metric} {best.mean(self.metric)}. "
        if self.baseline is None or self.baseline not in self.ranked:
            return text + "The baseline has not finished, so there are no differences to report."
        if best is self.baseline:
            text += "That is the baseline. "
        by_verdict = {
            verdict: "; ".join(t.label for t in self.ranked if self._verdict(t) == verdict) or "none"
            for verdict in ("better", "worse", WITHIN_NOISE)
        }
        return text + (
            f"Significantly better than the baseline ({self.baseline.label}): {by_verdict['better']}. "
            f"Significantly worse: {by_verdict['worse']}. Within noise: {by_verdict[WITHIN_NOISE]}."
        )

    def describe_failures(self) -> str:
        """Describe how many runs failed and how to repeat them, or return an empty string if no run failed."""
        n_runs = sum(max(len(trial.runs), trial.expected_runs) for trial in self.trials)
        failed = [(trial.number, run) for trial in self.trials for run in trial.runs if run.state == "failed"]
        if not failed:
            return ""
        n_trials = len({number for number, _ in failed})
        text = f"{len(failed)} of {n_runs} runs failed, in {n_trials} of {len(self.trials)} trials. "
        n_retryable = sum(run.retryable for _, run in failed)
        if n_retryable:
            text += f"For {n_retryable} of them, the settings may not be the cause; run the command again to retry. "
        if n_retryable < len(failed):
            text += "To repeat failed runs, add --retry failed to the command."
        return text.rstrip()

    def _verdict(self, trial: TrialResult) -> str:
        if trial is self.baseline:
            return "baseline"
        return self.comparisons[trial.number].verdict if trial.number in self.comparisons else ""

    def _comparison_head(self) -> list[str]:
        dimensions = list(self.ranked[0].assignment) if self.ranked else []
        mean = f"{self.metric}, mean ± 95% CI"
        return [*dimensions, "runs", mean, "difference from the baseline, paired by seed", "p (Holm)", "verdict"]

    def _comparison_row(self, trial: TrialResult) -> list[str]:
        settings = [format_setting(setting) for setting in trial.assignment.values()]
        row = [*settings, str(len(trial.runs)), str(trial.mean(self.metric))]
        comparison = self.comparisons.get(trial.number)
        if comparison is None:
            return [*row, "", "", self._verdict(trial)]
        return [*row, str(comparison.difference or ""), _format_p(comparison.corrected_p), comparison.verdict]

    def _describe_method(self) -> str:
        text = (
            "Confidence intervals are 95% Student's t intervals over the seeds. Differences are paired by seed, "
            "because runs with the same seed read the same samples in the same order. "
        )
        tested = sum(comparison.corrected_p is not None for comparison in self.comparisons.values())
        if tested:
            comparisons = "1 comparison" if tested == 1 else f"{tested} comparisons"
            text += (
                f"A difference is significant if its p-value is below 0.05 after Holm's correction for {comparisons}; "
                "the intervals are not corrected. "
            )
        overturned = [
            trial.label
            for trial in self.ranked
            if (comparison := self.comparisons.get(trial.number)) is not None
            and comparison.difference is not None
            and comparison.difference.excludes_zero
            and not comparison.significant
        ]
        if overturned:
            text += f"The interval excludes 0, but the corrected difference is within noise: {'; '.join(overturned)}."
        return text.rstrip()


def summarize_diagnostics(trials: Sequence[TrialResult]) -> Iterator[str]:
    """For each trial, yield one line per diagnosed problem that may explain differences between trials.

    A symptom that occurs in all runs does not distinguish trials and is listed only once. For any other symptom, only
    the first diagnosis in each trial is quoted, because the diagnoses of other runs differ only in their numbers.
    Nothing is yielded if there are no diagnoses.
    """
    found: dict[tuple[int, str], list[dict[str, str]]] = defaultdict(list)
    for trial in trials:
        for run in trial.runs:
            for symptom, first in {_symptom_name(each): each for each in reversed(run.diagnoses)}.items():
                found[trial.number, symptom].append(first)
    if not found:
        return
    symptoms = dict.fromkeys(symptom for _, symptom in found)
    shared = [
        symptom
        for symptom in symptoms
        if all(len(found.get((trial.number, symptom), ())) == len(trial.runs) for trial in trials)
    ]
    if shared:
        yield f"All runs: {'; '.join(shared)}."
    specific = [symptom for symptom in symptoms if symptom not in shared]
    for trial in trials:
        for symptom in specific:
            if diagnoses := found.get((trial.number, symptom)):
                text = "{symptom}. Likely: {cause}. Try: {flag}".format(**diagnoses[0])
                yield f"{trial.label}, {len(diagnoses)} of {len(trial.runs)} runs: {text}."
    without = [trial.label for trial in trials if not any((trial.number, symptom) in found for symptom in specific)]
    if without:
        yield f"No {'other ' if shared else ''}diagnoses: {'; '.join(without)}."


def _symptom_name(diagnosis: Mapping[str, str]) -> str:
    return diagnosis["symptom"].partition(":")[0]


def _escape_markdown(value: str) -> str:
    return value if isinstance(value, Markdown) else escape_markdown(redact(value))


def _escape_controls(value: Any) -> Any:
    """Redact passwords and escape control characters; jinja2 then escapes the HTML, except in ``Markup``."""
    return value if isinstance(value, Markup) else escape_terminal(redact(str(value)))


def _format_p(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.2g}" if p >= MIN_SHOWN_P else f"< {MIN_SHOWN_P}"


def _summarize_environment(trials: Sequence[TrialResult]) -> Iterator[tuple[str, str]]:
    """Yield each property (code, package version or hardware) with its distinct values across all runs."""
    facts: dict[str, dict[str, None]] = {}
    for trial in trials:
        for run in trial.runs:
            for part in ENVIRONMENT_PARTS:
                about: Mapping[str, Any] = run.session.get(part, {})
                for name, value in about.items():
                    if value is not None:
                        facts.setdefault(name, {})[str(value)] = None
    for name, values in facts.items():
        differs = " (differs between runs)" if len(values) > 1 else ""
        yield name.replace("_", " "), "; ".join(values) + differs


def _render(template: str, context: Mapping[str, Any], finalize: Callable[[Any], Any]) -> str:
    """Render a template; ``finalize`` is applied to each value, so that no value can be inserted unescaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    environment.filters |= {
        "table": lambda rows: Markdown(format_compact_table([[redact(cell) for cell in row] for row in rows])),
        "code_block": lambda text, language: markdown_code_block(redact(text), language),
    }
    return environment.get_template(template).render(context).rstrip("\n") + "\n"
