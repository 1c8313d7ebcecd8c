"""The numbers in the ablations' README are those of the stored results."""

import csv
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest

ABLATIONS = Path(__file__).parents[2] / "experiments" / "ablations"
PAGE = (ABLATIONS / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| \[(\w+)\][^|]*\| ([^|]*) \|", PAGE, flags=re.MULTILINE)


def runs(name: str) -> list[dict[str, str]]:
    with (ABLATIONS / "results" / name / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_ablation_is_on_the_page() -> None:
    vary = {path.stem for path in ABLATIONS.glob("*.yaml") if "\nvary:" in path.read_text(encoding="utf-8")}
    assert {name for name, _ in ROWS} == vary
    assert sum(len(runs(name)) for name in vary) == 120


@pytest.mark.parametrize(("name", "cell"), ROWS)
def test_numbers_are_means_over_seeds(name: str, cell: str) -> None:
    values = defaultdict(list)
    for row in runs(name):
        assert row["state"] == "finished"
        values[row["trial"]].append(float(row["val/bits_per_byte"]))
    assert {len(each) for each in values.values()} == {3}
    means = sorted(round(mean(each), 3) for each in values.values())
    assert [float(number) for number in re.findall(r"[1-3]\.\d{3}", cell)] == means


@pytest.mark.parametrize(("name", "cell"), ROWS)
def test_report_has_the_stored_means_and_its_plots(name: str, cell: str) -> None:
    folder = ABLATIONS / "results" / name
    report = (folder / "report.md").read_text(encoding="utf-8")
    table = report.split("## Findings")[1].split("## ")[0]
    found = [float(number) for number in re.findall(r"\| 3 \| ([\d.]+) ± ", table)]
    expected = [float(number) for number in re.findall(r"[1-3]\.\d{3}", cell)]
    assert found == pytest.approx(expected, abs=0.006)  # the report rounds each mean to its interval
    linked = set(re.findall(r"\((\w+\.svg)\)", report))
    assert linked == {path.name for path in folder.glob("*.svg")}


def test_diagnostics_explain_the_missing_warm_up() -> None:
    """The diagnosis of the three runs that did not learn is the one quoted on the page; no other run has one."""
    report = (ABLATIONS / "results" / "warmup" / "report.md").read_text(encoding="utf-8")
    section = report.split("## Diagnostics")[1].split("##")[0]
    (line,) = re.findall(r"^(.*), 3 of 3 runs: (.*)\.$", section, flags=re.MULTILINE)
    assert line[0] == "post without warm-up"
    assert "No other diagnoses: pre without warm-up; post." in section
    assert line[1] in PAGE.replace("\n> ", " ").replace("`", "")
