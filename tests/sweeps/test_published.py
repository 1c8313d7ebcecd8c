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
    assert sum(len(runs(name)) for name in vary) == 93


@pytest.mark.parametrize(("name", "said"), ROWS)
def test_a_figure_is_the_mean_over_seeds(name: str, said: str) -> None:
    values = defaultdict(list)
    for row in runs(name):
        assert row["state"] == "finished"
        values[row["trial"]].append(float(row["val/bits_per_byte"]))
    assert {len(each) for each in values.values()} == {3}
    means = sorted(round(mean(each), 3) for each in values.values())
    assert [float(figure) for figure in re.findall(r"[12]\.\d{3}", said)] == means
