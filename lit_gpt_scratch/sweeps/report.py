"""What a sweep found, and how sure that is: HTML, Markdown, and a row a run."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps import plots
from lit_gpt_scratch.sweeps.build_command import shown
from lit_gpt_scratch.sweeps.diagnostics_summary import diagnoses
from lit_gpt_scratch.sweeps.html_report import Code, Figure, Heading, Part, Table, Text, markdown, page
from lit_gpt_scratch.sweeps.statistics import Estimate, holm, paired, verdict
from lit_gpt_scratch.sweeps.trial import TrialResult, best, finished, format_setting

BEYOND: Final = ("better", "worse")
"""Verdicts on a difference that is not noise."""
LEAST: Final = 0.0001
"""Probability below which a number would say more than a few seeds can."""


@dataclass(frozen=True)
class SweepReport:
    """All that is said of some arms.

    Args:
        title: Of the document.
        question: Why the runs were made.
        metric: What they are judged by.
        direction: ``minimize`` or ``maximize``.
        arms: Trials, as far as they came.
        baseline: What the others are compared with.
        setting: What was varied, and what was not, in words.
        importance: Share of the differences that each dimension explains.
        command: Makes all of it again.
    """

    title: str
    question: str
    metric: str
    direction: str
    arms: list[TrialResult]
    baseline: TrialResult | None
    setting: Mapping[str, str]
    command: str
    importance: Mapping[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Leave ``report.html``, ``report.md`` with its figures, and ``results.csv``; the path of the first.

        Raises:
            UserError: The folder cannot be written.
        """
        parts = list(self.parts())
        files = {
            "results.csv": self.rows(),
            "report.md": markdown(self.title, parts),
            **{f"{part.name}.svg": part.svg for part in parts if isinstance(part, Figure)},
            "report.html": page(self.title, parts),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                unfinished = folder / f".{name}.unfinished"
                unfinished.write_text(content, encoding="utf-8")
                unfinished.replace(folder / name)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}") from error
        return folder / "report.html"

    def rows(self) -> str:
        """A row a run, as CSV."""
        dimensions = list(self.arms[0].assignment) if self.arms else []
        runs = [(arm, run) for arm in self.arms for run in arm.runs]
        metrics = dict.fromkeys([self.metric, *(name for _, run in runs for name in run.metrics)])
        written = io.StringIO()
        table = csv.writer(written, lineterminator="\n")
        table.writerow(["trial", *dimensions, "seed", "state", *metrics, "reason", "folder"])
        for arm, run in runs:
            figures = [run.metrics.get(name, "") for name in metrics]
            settings = [arm.assignment[name] for name in dimensions]
            table.writerow([arm.number, *settings, run.seed, run.state, *figures, run.reason, run.folder])
        return written.getvalue()

    def parts(self) -> Iterator[Part]:
        """The document."""
        if self.question:
            yield Text(self.question)
        yield from self._findings()
        yield from diagnoses(self.arms)
        yield Heading("What was done")
        yield Table(["", ""], [*self.setting.items()])
        yield Code(self.command)
        yield from self._drawings()
        yield from self._winner()
        yield from self._unfinished()
        if facts := list(_sessions(self.arms)):
            yield Heading("Versions and machine")
            yield Table(["", ""], facts)

    def _findings(self) -> Iterator[Part]:
        yield Heading("Findings")
        arms = self._ranked()
        if not arms:
            yield Text("No trial has come to its end.")
            return
        differences = {arm.number: self._difference(arm) for arm in arms if arm is not self.baseline}
        verdicts = {number: verdict(each, self.direction) for number, each in differences.items()}
        yield Text(self._in_words(arms, verdicts))
        ps = {number: each.p for number, each in differences.items() if each and each.p is not None}
        corrected = dict(zip(ps, holm(list(ps.values())), strict=True))
        head = [*arms[0].assignment, "runs", f"{self.metric}, mean ± 95% CI"]
        rows = []
        for arm in arms:
            row = [*map(format_setting, arm.assignment.values()), str(len(arm.runs)), str(arm.estimate(self.metric))]
            if arm is self.baseline:
                rows.append([*row, "", "", "the baseline"])
            else:
                p = _probability(corrected.get(arm.number))
                rows.append([*row, str(differences[arm.number] or ""), p, verdicts[arm.number]])
        yield Table([*head, "less the baseline, by seeds", "p (Holm)", ""], rows)
        yield Text(
            "Intervals are Student's t over the seeds, at 95%. A difference is taken seed by seed, because runs of one "
            "seed read the same windows in the same order; it is within noise where its interval holds 0. "
            f"{self._several(corrected, verdicts)}"
        )

    def _in_words(self, arms: Sequence[TrialResult], verdicts: Mapping[int, str]) -> str:
        first = arms[0]
        said = f"The best mean is that of {first.label}: {self.metric} {first.estimate(self.metric)}. "
        if self.baseline not in arms or self.baseline is None:
            return said + "The baseline has not come to its end, so there is nothing to compare with."
        beyond = [arm.label for arm in arms if verdicts.get(arm.number) in BEYOND]
        noise = [arm.label for arm in arms if verdicts.get(arm.number) == "within noise"]
        if first is self.baseline:
            said += "That is the baseline. "
        said += f"Beyond noise against the baseline ({self.baseline.label}): {'; '.join(beyond) or 'none'}. "
        return said + f"Within noise: {'; '.join(noise) or 'none'}."

    def _several(self, corrected: Mapping[int, float], verdicts: Mapping[int, str]) -> str:
        if len(corrected) < 2:
            return ""
        beyond = [number for number, said in verdicts.items() if said in BEYOND]
        hold = sum(corrected.get(number, 1.0) < 0.05 for number in beyond)
        said = f"Each interval is for itself: of {len(corrected)} comparisons some may leave 0 by chance. "
        if not beyond:
            return said + "Here none does."
        stay = "stays" if hold == 1 else "stay"
        return said + f"Corrected for that (Holm), {hold} of the {len(beyond)} differences beyond noise {stay}."

    def _drawings(self) -> Iterator[Part]:
        arms = self._ranked()
        if not arms:
            return
        yield Heading("Figures")
        dimensions = list(arms[0].assignment)
        if len(arms) > 2 and len(dimensions) == 1 and plots.number(arms, dimensions[0]):
            yield plots.over_numbers(arms, self.metric, dimensions[0])
        else:
            yield plots.values(arms, self.metric, self.baseline)
        pruned = [arm for arm in self.arms if arm.state == "pruned"]
        for over in ("tokens", "seconds"):
            if drawn := plots.curves([*arms, *pruned], self.metric, over):
                yield drawn
        if self.importance:
            yield plots.importance(self.importance)
            yield Table(["dimension", "importance"], [[n, f"{share:.2f}"] for n, share in self.importance.items()])

    def _winner(self) -> Iterator[Part]:
        winner = best(self.arms, self.metric, self.direction)
        if winner is not None:
            yield Heading("The best again")
            yield Code("\n".join(shown(winner.flags, run.seed) for run in winner.runs))

    def _unfinished(self) -> Iterator[Part]:
        rows = [
            [str(arm.number), arm.label, str(run.seed), run.state, run.reason]
            for arm in self.arms
            for run in arm.runs
            if run.state != "finished"
        ]
        to_come = sum(arm.state == "unfinished" for arm in self.arms)
        if rows or to_come:
            yield Heading("Failed and stopped runs")
        if rows:
            yield Table(["trial", "settings", "seed", "", "reason"], rows)
        if to_come:
            yield Text(f"{to_come} trials are not at their end; the same command goes on with them.")

    def _ranked(self) -> list[TrialResult]:
        sign = 1 if self.direction == "minimize" else -1
        return sorted(finished(self.arms, self.metric), key=lambda arm: sign * arm.estimate(self.metric).mean)

    def _difference(self, arm: TrialResult) -> Estimate | None:
        if self.baseline is None:
            return None
        return paired(arm.values(self.metric), self.baseline.values(self.metric))


def _probability(p: float | None) -> str:
    if p is None:
        return ""
    return f"{p:.2g}" if p >= LEAST else f"< {LEAST}"


def _sessions(arms: Sequence[TrialResult]) -> Iterator[list[str]]:
    """Each fact of the runs' surroundings, with all values that it had."""
    facts: dict[str, dict[str, None]] = {}
    for arm in arms:
        for run in arm.runs:
            for part in ("code", "versions", "hardware"):
                about: Mapping[str, Any] = run.session.get(part, {})
                for name, value in about.items():
                    if value is not None:
                        facts.setdefault(name, {})[str(value)] = None
    for name, values in facts.items():
        yield [name.replace("_", " "), "; ".join(values) + (" (not the same in all runs)" if len(values) > 1 else "")]
