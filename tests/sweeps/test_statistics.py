"""Intervals against tables, arithmetic by hand, and draws whose truth is known."""

import math

import numpy as np
import pytest

pytest.importorskip("optuna")

from lit_gpt_scratch.sweeps.statistics import Estimate, estimate, holm, paired, verdict

T_975 = {1: 12.706204736, 2: 4.302652730, 4: 2.776445105, 9: 2.262157163}
"""Student's t, two-sided 95%, by degrees of freedom, from a printed table."""


@pytest.mark.parametrize(
    "values", [[1.0, 2.0], [1.0, 2.0, 4.0], [0.3, 0.1, 0.2, 0.5, 0.4], list(map(float, range(10)))]
)
def test_an_interval_is_the_tables(values: list[float]) -> None:
    n = len(values)
    mean = sum(values) / n
    s = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    found = estimate(values)
    assert found.mean == pytest.approx(mean)
    assert found.half == pytest.approx(T_975[n - 1] * s / math.sqrt(n), rel=1e-8)


def test_three_seeds_by_hand() -> None:
    found = estimate([1.50, 1.52, 1.54])  # s = 0.02, error 0.02 / sqrt(3) = 0.011547
    assert str(found) == "1.520 ± 0.050"
    assert estimate([1.5]) == Estimate(1.5, None, None, 1)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(0.0, 1.0, (4000, 3))
    left_out = np.mean([estimate(list(row)).excludes_zero for row in draws])
    assert left_out == pytest.approx(0.05, abs=0.01)
    ps = [estimate(list(row)).p or 0.0 for row in draws]
    assert np.mean(np.array(ps) < 0.3) == pytest.approx(0.3, abs=0.025)  # uniform where nothing is there


def test_pairs_cancel_what_seeds_share() -> None:
    baseline = {1: 1.0, 2: 2.0, 3: 3.0}
    found = paired({1: 0.9, 2: 1.88, 3: 2.89, 4: 0.0}, baseline)
    assert found is not None
    assert found.n == 3
    assert found.mean == pytest.approx(-0.11)
    assert found.half == pytest.approx(T_975[2] * 0.01 / math.sqrt(3), rel=1e-6)
    assert verdict(found, "minimize") == "better"
    assert verdict(found, "maximize") == "worse"
    assert verdict(paired({1: 0.9, 2: 2.1, 3: 3.0}, baseline), "minimize") == "within noise"
    assert verdict(paired({4: 1.0}, baseline), "minimize") == "not comparable: no common seed"
    assert verdict(paired({1: 0.1}, baseline), "minimize") == "not known: one seed"
    assert verdict(paired(baseline, baseline), "minimize") == "within noise"


def test_holm_by_hand() -> None:
    # Of four, the least is multiplied by 4, the next by 3, and none may be below one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
