"""Intervals against published values, a formula, and their coverage in simulated experiments."""

import math

import numpy as np
import pytest

from lit_gpt_scratch.evaluation.intervals import (
    MAX_GROUPS,
    Measurements,
    jackknife_standard_errors,
    student_t_quantile,
    summarize,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3 (https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E)
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0 / 20, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_against_published_values(share: float, n: int, low: float, high: float) -> None:
    assert wilson_interval(share, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [2, 37, MAX_GROUPS])
def test_jackknife_of_a_mean_is_its_standard_error(n: int) -> None:
    values = np.random.default_rng(0).normal(size=n)
    everything = np.arange(n)
    found = jackknife_standard_errors(lambda places: {"mean": float(values[places].mean())}, everything, everything)
    assert found is not None
    assert found["mean"] == pytest.approx(values.std(ddof=1) / math.sqrt(n))


def test_single_row_has_an_interval_only_for_a_share() -> None:
    one = Measurements.from_rows(1, lambda places: {"right": 1.0, "length": 3.0}, frozenset({"right"}))
    found = summarize(one)
    assert found.intervals["length"] is None
    assert found.intervals["right"] == wilson_interval(1.0, 1)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_coverage_with_few_rows(n: int) -> None:
    """A normal interval would cover the true value in 70% of the experiments with two rows, and in 88% with five."""
    rng, held = np.random.default_rng(n), 0
    for _ in range(1000):
        values = rng.normal(size=n)
        measured = Measurements.from_rows(n, lambda at, values=values: {"mean": float(values[at].mean())})
        low, high = summarize(measured).intervals["mean"]
        held += low < 0.0 < high
    assert 0.93 <= held / 1000 <= 0.97


def test_student_t_quantile_equals_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 40), 99):
        assert student_t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1.3e-3)


def test_interval_respects_the_limits_of_a_metric() -> None:
    values = np.array([0.0, 0.0, 1.0])
    for sign, expected in ((1.0, 0.0), (-1.0, 1.0)):
        shares = values if sign > 0 else 1 - values
        measured = Measurements.from_rows(
            3, lambda at, of=shares: {"mean": float(of[at].mean())}, limits={"mean": (0.0, 1.0)}
        )
        assert summarize(measured).intervals["mean"][sign < 0] == expected


def test_constant_metric_has_no_interval() -> None:
    measured = Measurements.from_rows(20, lambda at: {"accuracy": 1.0, "f1": 1.0}, frozenset({"accuracy"}))
    assert summarize(measured).intervals == {"accuracy": wilson_interval(1.0, 20), "f1": None}


@pytest.mark.parametrize("n", [40, 250])
def test_coverage_is_95_percent(n: int) -> None:
    """Documents of different length and difficulty; the loss is a ratio of sums, as for texts."""
    rng = np.random.default_rng(n)
    held = 0
    for _ in range(400):
        tokens = rng.integers(10, 200, n)
        nats = tokens * rng.gamma(9.0, 1 / 3.0, n)  # mean 3 per token, one level per document
        measured = Measurements.from_rows(n, lambda at, a=nats, b=tokens: {"loss": float(a[at].sum() / b[at].sum())})
        low, high = summarize(measured).intervals["loss"]
        held += low < 3.0 < high
    assert 0.91 <= held / 400 <= 0.98


def test_subset_of_rows() -> None:
    values = np.arange(10.0)
    measured = Measurements(
        np.repeat(np.arange(5), 2), 5, lambda at: {"mean": float(values[at].mean())}, extra=lambda at: {"n": len(at)}
    )
    found = summarize(measured, np.array([True, False, False, False, True]))
    assert found.metrics["mean"] == np.mean([0, 1, 8, 9])
    assert (found.rows, found.extra) == (2, {"n": 4})
