"""What the report says of runs whose figures are known."""

import csv
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from lit_gpt_scratch.sweeps.html_report import Code, Heading, Table, Text, markdown, page
from lit_gpt_scratch.sweeps.report import SweepReport
from lit_gpt_scratch.sweeps.run_results import CurvePoint, RunResult
from lit_gpt_scratch.sweeps.trial import TrialResult

METRIC = "val/bits_per_byte"
SESSION = {"versions": {"torch": "2.13.0"}, "hardware": {"system": "Linux", "threads": 2}, "code": {"commit": "abc"}}


def arm(number: int, label: str, values: list[float], **changes: str) -> TrialResult:
    runs = [
        RunResult(
            seed=seed,
            metrics={METRIC: value, "tokens": 1000.0, "step": 10.0, "seconds": 5.0},
            curve=[CurvePoint(5, 2.0, value + 1), CurvePoint(10, 4.0, value)],
            folder=f"runs/{label}_{seed}",
            session=SESSION,
            **changes,
        )
        for seed, value in enumerate(values, 1)
    ]
    return TrialResult(
        number, {"position": label}, runs, ["--config=base.yaml", f"--model.gpt.position={label}"], len(values)
    )


def report(*arms: TrialResult, direction: str = "minimize") -> SweepReport:
    return SweepReport(
        title="Positions",
        question="Which <position> is best?",
        metric=METRIC,
        direction=direction,
        arms=list(arms),
        baseline=arms[0],
        setting={"position": "rotary, learned"},
        command="python -m lit_gpt_scratch.sweep positions.yaml",
    )


ARMS = (
    arm(0, "rotary", [1.50, 1.52, 1.54]),
    arm(1, "learned", [1.60, 1.63, 1.63]),  # differences 0.10, 0.11, 0.09: beyond noise
    arm(2, "alibi", [1.48, 1.55, 1.50]),  # -0.02, +0.03, -0.04: the interval holds 0
    arm(3, "none", [9.0], state="failed", reason="out of memory"),
)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_it_says_plainly_what_is_noise() -> None:
    text = markdown("x", list(report(*ARMS).parts()))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert rows["learned"].endswith("| worse |")
    assert "+" not in rows["learned"]
    assert "0.100 ± 0.025" in rows["learned"]  # 4.3027 * 0.01 / sqrt(3) = 0.0248
    assert rows["alibi"].endswith("| within noise |")
    assert "1.520 ± 0.050" in rows["rotary"]
    assert rows["rotary"].endswith("| the baseline |")
    assert "Within noise: alibi." in text
    assert "Beyond noise against the baseline (rotary): learned." in text
    assert "of 2 comparisons some may leave 0 by chance" in text
    other = markdown("x", list(report(*ARMS, direction="maximize").parts()))
    assert "The best mean is that of learned" in other
    assert re.search(r"\| learned .* better \|", other)


def test_it_says_what_the_doctor_said_choice_by_choice() -> None:
    def said(symptom: str) -> dict[str, str]:
        return {"symptom": symptom, "cause": "a rate too high", "flag": "--model.optimizer.lr 1e-4"}

    arms = [arm(number, label, [1.5, 1.6]) for number, label in enumerate(("pre", "post", "late"))]
    for each in arms:
        for run in each.runs:
            run.diagnoses.append(said(f"far from compute-optimal: {run.seed} tokens a parameter"))
    assert "Of every run: far from compute-optimal.\n\nNothing else of pre; post; late." in _words(arms)
    for nth in (0, 1):
        arms[2].runs[nth].diagnoses.extend([said(f"loss not falling: 5.{nth}"), said("loss not falling: again")])
    arms[1].runs[1].diagnoses.append(said("spikes: of one"))
    words = _words(arms)
    assert "\npost, 1 of 2 runs: spikes: of one. Likely: a rate too high. Try: --model.optimizer.lr 1e-4.\n" in words
    assert "late, 2 of 2 runs: loss not falling: 5.0. Likely: a rate too high. Try" in words
    assert "Nothing else of pre." in words
    for each in arms:
        for run in each.runs:
            run.diagnoses.clear()
    assert "doctor" not in _words(arms)


def _words(arms: list[TrialResult]) -> str:
    return markdown("x", list(report(*arms).parts()))


def test_it_holds_what_it_must(tmp_path: Path) -> None:
    report(*ARMS).write(tmp_path)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        for words in (
            "python -m lit_gpt_scratch.fit --config=base.yaml --model.gpt.position=alibi --seed_everything=2",
            "out of memory", "2.13.0", "Linux", "abc", "python -m lit_gpt_scratch.sweep positions.yaml", "over tokens",
            "over seconds", "rotary, learned",
        ):  # fmt: skip
            assert words in text, (name, words)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html", "report.md", "results.csv", "values.svg", "curves_over_tokens.svg", "curves_over_seconds.svg",
    }  # fmt: skip
    for drawing in tmp_path.glob("*.svg"):
        ET.parse(drawing)
        assert f"({drawing.name})" in (tmp_path / "report.md").read_text()


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    text = report(*ARMS).write(tmp_path).read_text()
    tags = _Tags()
    tags.feed(text)
    assert sum(tag == "svg" for tag, _ in tags.seen) == 3
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in tags.seen}
    linked = [v for _, attrs in tags.seen for k, v in attrs.items() if k in ("src", "href", "xlink:href") and v]
    assert all(link.startswith("#") for link in linked)
    assert "Which &lt;position&gt; is best?" in text


def test_the_same_runs_make_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
        report(*ARMS).write(folder)
    assert all(path.read_bytes() == (folders[1] / path.name).read_bytes() for path in folders[0].iterdir())


def test_a_row_a_run() -> None:
    table = list(csv.DictReader(io.StringIO(report(*ARMS).rows())))
    assert len(table) == 10
    assert list(table[0])[:4] == ["trial", "position", "seed", "state"]
    assert [float(row[METRIC]) for row in table[:3]] == [1.50, 1.52, 1.54]
    assert table[-1]["reason"] == "out of memory"


def test_one_seed_and_no_trial() -> None:
    text = markdown("x", list(report(arm(0, "a", [1.0]), arm(1, "b", [0.9])).parts()))
    assert "not known: one seed" in text
    assert "No trial has come to its end." in markdown("x", list(report(ARMS[3]).parts()))


@pytest.mark.parametrize("cell", ["a|b", "<b>", "-1.5", "1 & 2"])
def test_both_forms_say_the_same(cell: str) -> None:
    parts = [Heading("h"), Text("t"), Code("c"), Table(["head"], [[cell]])]
    assert f"| {cell.replace('|', chr(92) + '|')} |" in markdown("x", parts)
    shown = re.findall(r"<td[^>]*>(.*?)</td>", page("x", parts))
    assert shown == [cell.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")]
