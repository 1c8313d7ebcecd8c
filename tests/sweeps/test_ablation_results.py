"""The figures on the page of the ablations are those of the runs that lie beside it."""

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
    assert sum(len(runs(name)) for name in vary) == 102


@pytest.mark.parametrize(("name", "said"), ROWS)
def test_a_figure_is_the_mean_over_seeds(name: str, said: str) -> None:
    values = defaultdict(list)
    for row in runs(name):
        assert row["state"] == "finished"
        values[row["trial"]].append(float(row["val/bits_per_byte"]))
    assert {len(each) for each in values.values()} == {3}
    means = sorted(round(mean(each), 3) for each in values.values())
    assert [float(figure) for figure in re.findall(r"[1-3]\.\d{3}", said)] == means


def test_the_doctor_explains_what_a_missing_warm_up_does() -> None:
    """Of the three runs that failed, and of no other, it says what the page has."""
    report = (ABLATIONS / "results" / "warmup" / "report.md").read_text(encoding="utf-8")
    said = report.split("## What the doctor said")[1].split("##")[0]
    (line,) = re.findall(r"^(.*), 3 of 3 runs: (.*)\.$", said, flags=re.MULTILINE)
    assert line[0] == "post without warm-up"
    assert "Nothing else of pre without warm-up; post." in said
    assert line[1] in PAGE.replace("\n> ", " ").replace("`", "")
