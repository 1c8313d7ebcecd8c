"""The figures in the scaling README, and the shipped scaling law, are those of the stored results of the ladder."""

import csv
import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")

from lit_gpt_scratch.cli.budget import SHIPPED_LAW
from lit_gpt_scratch.sweeps.scaling_law import LadderFit, MeasuredPoint, ScalingLaw, fit_scaling_law

SCALING = Path(__file__).parents[2] / "experiments" / "scaling"
RESULTS = SCALING / "results" / "ladder"
PAGE = (SCALING / "README.md").read_text(encoding="utf-8")
HELD_OUT = ("5x160", "4e6")


def read_points() -> dict[tuple[str, str], MeasuredPoint]:
    with (RESULTS / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    points: dict[tuple[str, str], MeasuredPoint] = {}
    for row in rows:
        assert row["state"] == "finished"
        key = row["size"], row["budget.tokens"]
        sizes = float(row["parameters"]), float(row["tokens"]), float(row["flops_per_token"])
        losses = points[key].losses if key in points else ()
        points[key] = MeasuredPoint(*sizes, (*losses, float(row["val/bits_per_byte"])))
    return points


def read_result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def fit() -> LadderFit:
    """Law fitted to all trials except the held-out one."""
    return LadderFit(tuple(point for key, point in read_points().items() if key != HELD_OUT))


def test_the_shipped_law_is_fitted_to_the_ladder(fit: LadderFit) -> None:
    law = json.loads(SHIPPED_LAW.read_text(encoding="utf-8"))
    assert law == read_result("scaling_law.json")
    assert law["n_runs"] == sum(len(point.losses) for point in fit.points) == 38
    shipped = ScalingLaw(**law["law"])
    for point in fit.points:
        fitted = fit.law.loss(point.parameters, point.tokens)
        assert shipped.loss(point.parameters, point.tokens) == pytest.approx(fitted, rel=1e-4)


def test_the_page_states_the_results(fit: LadderFit) -> None:
    prediction = read_result("prediction.json")
    measured = mean(read_points()[HELD_OUT].losses)
    [found] = re.findall(r"predicted ([\d.]+) bits per byte \(([\d.]+) to ([\d.]+)\), measured ([\d.]+)", PAGE)
    expected = [prediction["loss"], prediction["low"], prediction["high"], measured]
    assert [*map(float, found)] == [round(each, 3) for each in expected]
    assert prediction["low"] < measured < prediction["high"]
    [errors] = re.findall(r"by ([\d.]+)% instead of ([\d.]+)%", PAGE)
    columns = [(point.parameters, point.tokens, loss) for point in fit.points for loss in point.losses]
    laws = fit.law, fit_scaling_law(*np.array(columns).T)
    assert [*map(float, errors)] == [round(100 * fit.prediction_error(law), 1) for law in laws]


@pytest.mark.slow
def test_the_page_states_the_interval_of_the_shipped_law(fit: LadderFit) -> None:
    prediction = read_result("prediction.json")
    [found] = re.findall(r"predicts ([\d.]+) \(([\d.]+) to ([\d.]+)\)", PAGE)
    interval = fit.predict(prediction["parameters"], prediction["tokens"])
    assert [*map(float, found)] == pytest.approx([*interval], abs=6e-4)
