"""The content of reports and plots of runs with known metrics."""

import csv
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tensorboard.plugin_util import markdown_to_safe_html

pytest.importorskip("optuna")

from lit_gpt_scratch.sweeps.plots import plot_curves, plot_differences, plot_differences_over, robust_limits
from lit_gpt_scratch.sweeps.report import SweepReport
from lit_gpt_scratch.sweeps.run_results import CurvePoint, RunResult, TrialResult
from lit_gpt_scratch.terminal_output import escape_line
from tests.hostile import HOSTILE
from tests.text.test_markdown import is_control

METRIC = "val/bits_per_byte"
SESSION = {"versions": {"torch": "2.13.0"}, "hardware": {"system": "Linux", "threads": 2}, "code": {"commit": "abc"}}


def trial(number: int, label: str, values: list[float], **changes: str) -> TrialResult:
    runs = [
        RunResult(
            seed=seed,
            metrics={METRIC: value, "tokens": 1000.0, "step": 10.0, "seconds": 5.0},
            curve=[CurvePoint(5, 2.0, value + 1), CurvePoint(10, 4.0, value)],
            folder=f"runs/{label}_{seed}",
            session=SESSION,
            **changes,  # type: ignore[arg-type]  # strings
        )
        for seed, value in enumerate(values, 1)
    ]
    flags = ["--config=base.yaml", f"--model.gpt.position={label}"]
    return TrialResult(number, {"position": label}, runs, flags, len(values))


def report(*trials: TrialResult, direction: str = "minimize") -> SweepReport:
    return SweepReport(
        title="Positions",
        question="Which <position> is best?",
        metric=METRIC,
        direction=direction,
        trials=list(trials),
        baseline=trials[0],
        setup={"position": "rotary, learned"},
        command="python -m lit_gpt_scratch.sweep positions.yaml",
    )


TRIALS = (
    trial(0, "rotary", [1.50, 1.52, 1.54]),
    trial(1, "learned", [1.60, 1.63, 1.63]),  # differences 0.10, 0.11, 0.09: significant
    trial(2, "alibi", [1.48, 1.55, 1.50]),  # -0.02, +0.03, -0.04: within noise
    trial(3, "none", [9.0], state="failed", reason="out of memory"),
)


def table_rows(text: str) -> dict[str, str]:
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_findings_and_table() -> None:
    text = report(*TRIALS).markdown()
    rows = table_rows(text)
    assert rows["learned"].endswith("| worse |")
    assert "+" not in rows["learned"]
    assert "0.100 ± 0.025" in rows["learned"]  # 4.3027 * 0.01 / sqrt(3) = 0.0248
    assert rows["alibi"].endswith("| within noise |")
    assert "1.520 ± 0.050" in rows["rotary"]
    assert rows["rotary"].endswith("| baseline |")
    assert "Significantly better than the baseline (rotary): none." in text
    assert "Significantly worse: learned. Within noise: alibi." in text
    assert "after Holm's correction for 2 comparisons" in text
    maximized = report(*TRIALS, direction="maximize").markdown()
    assert "Best mean: learned" in maximized
    assert re.search(r"\| learned .* better \|", maximized)


def test_holm_correction_overturns_a_verdict_everywhere() -> None:
    """Differences of mean 0.1 and standard error 0.02: p = 0.0377, corrected for two 0.0755 (see test_statistics)."""
    deviation = 0.02 * 3**0.5
    baseline = trial(0, "rotary", [1.5, 1.5, 1.5])
    unsure = trial(1, "learned", [1.6 - deviation, 1.6, 1.6 + deviation])
    third = trial(2, "alibi", [1.48, 1.53, 1.51])
    alone = report(baseline, unsure)
    assert table_rows(alone.markdown())["learned"].endswith("| 0.038 | worse |")
    assert "worse" in alone.plots[0].svg
    both = report(baseline, unsure, third)
    assert table_rows(both.markdown())["learned"].endswith("| 0.075 | within noise |")
    for text in (both.markdown(), both.html()):
        assert "Significantly worse: none." in text
        assert "The interval excludes 0, but the corrected difference is within noise: learned." in text
    assert "worse" not in both.plots[0].svg
    assert "within noise" in both.plots[0].svg


def test_diagnostics_by_trial() -> None:
    def diagnosis(symptom: str) -> dict[str, str]:
        return {"symptom": symptom, "cause": "a rate too high", "flag": "--model.optimizer.lr 1e-4"}

    trials = [trial(number, label, [1.5, 1.6]) for number, label in enumerate(("pre", "post", "late"))]
    for each in trials:
        for run in each.runs:
            run.diagnoses.append(diagnosis(f"far from compute-optimal: {run.seed} tokens a parameter"))
    text = report(*trials).markdown()
    assert "All runs: far from compute-optimal.\n\nNo other diagnoses: pre; post; late." in text
    for nth in (0, 1):
        trials[2].runs[nth].diagnoses.extend(
            [diagnosis(f"loss not falling: 5.{nth}"), diagnosis("loss not falling: x")]
        )
    trials[1].runs[1].diagnoses.append(diagnosis("spikes: of one"))
    text = report(*trials).markdown()
    assert "\npost, 1 of 2 runs: spikes: of one. Likely: a rate too high. Try: --model.optimizer.lr 1e-4.\n" in text
    assert "late, 2 of 2 runs: loss not falling: 5.0. Likely: a rate too high. Try" in text
    assert "No other diagnoses: pre." in text
    for each in trials:
        for run in each.runs:
            run.diagnoses.clear()
    assert "iagnos" not in report(*trials).markdown()


def test_files_and_their_content(tmp_path: Path) -> None:
    report(*TRIALS).write(tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        for words in (
            "python -m lit_gpt_scratch.fit --config=base.yaml --model.gpt.position=alibi --seed_everything=2",
            "out of memory", "2.13.0", "Linux", "abc", "python -m lit_gpt_scratch.sweep positions.yaml", "over tokens",
            "over seconds", "rotary, learned",
        ):  # fmt: skip
            assert words in text, (name, words)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html", "report.md", "results.csv", "differences.svg", "curves_over_tokens.svg",
        "curves_over_seconds.svg",
    }  # fmt: skip
    for plot in tmp_path.glob("*.svg"):
        ET.parse(plot)
        assert f"({plot.name})" in (tmp_path / "report.md").read_text()


def test_html_needs_no_other_file(tmp_path: Path) -> None:
    text = report(*TRIALS).write(tmp_path).read_text()
    tags = _Tags()
    tags.feed(text)
    assert sum(tag == "svg" for tag, _ in tags.seen) == 3
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in tags.seen}
    linked = [v for _, attrs in tags.seen for k, v in attrs.items() if k in ("src", "href", "xlink:href") and v]
    assert all(link.startswith("#") for link in linked)
    assert "Which &lt;position&gt; is best?" in text


def test_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        report(*TRIALS).write(folder)
    assert all(path.read_bytes() == (folders[1] / path.name).read_bytes() for path in folders[0].iterdir())


def test_csv_has_one_row_per_run() -> None:
    table = list(csv.DictReader(io.StringIO(report(*TRIALS).results_csv())))
    assert len(table) == 10
    assert list(table[0])[:4] == ["trial", "position", "seed", "state"]
    assert [float(row[METRIC]) for row in table[:3]] == [1.50, 1.52, 1.54]
    assert table[-1]["reason"] == "out of memory"


def test_one_seed_and_no_finished_trial() -> None:
    assert "only one seed" in report(trial(0, "a", [1.0]), trial(1, "b", [0.9])).markdown()
    assert "No trial has finished." in report(TRIALS[3]).markdown()


@pytest.mark.parametrize("cell", ["a|b", "<b>", "-1.5", "1 & 2"])
def test_cells_are_escaped(cell: str) -> None:
    escaped = report(trial(0, cell, [1.0, 1.1]))
    shown = {"a|b": r"a\|b", "<b>": "&#60;b>"}.get(cell, cell)
    assert f"| {shown} |" in escaped.markdown()
    assert re.findall(r"<td>(.*?)</td>", escaped.html())[0] == escape(cell)


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "surrogate"])  # YAML and JSON files have none
def test_hostile_text_is_displayed(name: str) -> None:
    """From sweep files, configs and logs: in the table, in paragraphs, headings, code blocks and plots."""
    text = HOSTILE[name]
    trials = [trial(0, "a", [1.50, 1.52, 1.54]), trial(1, text, [1.60, 1.63, 1.63])]
    failed = trial(2, f"{text}2", [9.0], state="failed", reason=text)
    failed.runs[0].diagnoses.append({"symptom": f"{text}: x", "cause": text, "flag": text})
    made = replace(
        report(*trials, failed), title=text, question=text, setup={text: text}, importance={text: 0.4, "b": 0.6},
        command=f"python -m lit_gpt_scratch.sweep '{text}'",
    )  # fmt: skip
    shown = " ".join(escape_line(text).split())
    for page in (markdown_to_safe_html(made.markdown()), made.html()):
        tags = _Tags()
        tags.feed(page)
        foreign = [tag for tag, _ in tags.seen if tag in ("a", "script", "iframe", "link")]
        images = {attributes.get("src") for tag, attributes in tags.seen if tag == "img"}
        assert not foreign
        assert images <= {f"{plot.name}.svg" for plot in made.plots}
        seen = " ".join(unescape(re.sub(r"<[^>]*>", "", page)).split())
        assert seen.count(shown) >= 5 or "\n" in text
        assert not any(map(is_control, page.replace("\n", "")))
    for plot in made.plots:
        assert "differences" not in plot.name or shown[:20] in " ".join(words(plot.svg).split())


def test_passwords_are_not_in_reports(tmp_path: Path) -> None:
    failed = trial(1, "x", [9.0], state="failed", reason="cannot reach postgresql://me:hunter2@host")
    flags = ["--trainer.logger.api_key=hunter2", "--data.source=s3://key:hunter2@bucket"]
    first = replace(trial(0, "a", [1.5, 1.6]), flags=flags)
    replace(report(first, failed), setup={"fixed: source": flags[1]}).write(tmp_path)
    for path in tmp_path.iterdir():
        assert "hunter2" not in path.read_text(encoding="utf-8"), path


def test_markdown_layout() -> None:
    """Headings and tables are separated by one blank line, as Markdown needs."""
    unfinished = TrialResult(4, {"position": "late"}, [], [], 3)
    text = report(*TRIALS, unfinished).markdown()
    assert "\n\n\n" not in text
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("#"):
            assert not lines[number + 1]
            assert number == 0 or not lines[number - 1]
        if line.startswith("| --- "):
            assert lines[number - 1].startswith("|")
            assert not lines[number - 2]
            assert line.count("|") == lines[number - 1].count("|")


def words(svg: str) -> str:
    return "\n".join(ET.fromstring(svg[svg.index("<svg") :]).itertext())


def test_plot_of_differences_says_what_it_shows() -> None:
    whole = report(*TRIALS)
    text = words(plot_differences(whole.ranked, TRIALS[0], whole.comparisons, METRIC, "minimize").svg)
    for part in (
        "Difference from the baseline (rotary), paired by seed",
        "difference in val/bits_per_byte [bits per byte], lower is better",
        "0.100 ± 0.025  worse",
        "within noise (p ≥ 0.05 after Holm's correction)",
        "worse (p < 0.05 after Holm's correction)",
        "one seed",
    ):
        assert part in text
    text = words(plot_curves(whole.ranked, METRIC, "maximize", "seconds").svg)  # type: ignore[union-attr]
    for part in ("val/bits_per_byte over seconds", "time since the start of training [s]", "higher is better", "alibi"):
        assert part in text
    assert "training tokens" in words(plot_curves(whole.ranked, METRIC, "minimize", "tokens").svg)  # type: ignore[union-attr]


def test_numeric_dimension_is_on_the_x_axis() -> None:
    trials = [trial(n, lr, [1.5 + n / 10, 1.52 + n / 10]) for n, lr in enumerate(("0.01", "0.1", "0.001"))]
    whole = report(*trials)
    text = words(whole.plots[0].svg)
    assert "position" in text.splitlines()
    expected = plot_differences_over(whole.ranked, trials[0], whole.comparisons, METRIC, "minimize", "position")
    assert whole.plots[0] == expected


@pytest.mark.parametrize(
    ("ranges", "limits"),
    [
        ([(-0.1, 0.2)], (-0.1, 0.2)),
        ([(0.0, 0.1), (0.0, 1.0)], (0.0, 0.1)),  # 1.0 is an outlier
        ([(0.0, 0.001), (0.0, 0.9), (0.0, 1.0)], (0.0, 1.0)),  # outliers are at most half
        ([(-0.1, 0.1), (0.0, 0.3), (0.2, 0.4), (-9.0, -8.0)], (-0.1, 0.4)),
        ([(0.0, 0.0), (0.0, 1.0)], (0.0, 1.0)),
    ],
)
def test_axis_limits_leave_out_outliers(ranges: list[tuple[float, float]], limits: tuple[float, float]) -> None:
    margin = 0.08 * (limits[1] - limits[0])
    assert robust_limits(ranges) == pytest.approx((limits[0] - margin, limits[1] + margin))


def test_clipped_trial_is_annotated() -> None:
    whole = report(TRIALS[0], TRIALS[2], trial(1, "broken", [9.0, 9.1, 9.3]))
    text = words(whole.plots[0].svg)
    assert "7.61 ± 0.33  worse (off the axis)" in text
    assert "broken (off the axis: 10.3)" in words(whole.plots[1].svg)
