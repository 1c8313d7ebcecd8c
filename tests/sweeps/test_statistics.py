"""Intervals against printed tables, corrections by hand, and error rates on simulated data."""

import math

import numpy as np
import pytest

pytest.importorskip("optuna")

from lit_gpt_scratch.sweeps.statistics import (
    Estimate,
    compare_to_baseline,
    estimate_mean,
    holm_correction,
    paired_differences,
)

T_975 = {1: 12.706204736, 2: 4.302652730, 4: 2.776445105, 9: 2.262157163}
"""Student's t, two-sided 95%, by degrees of freedom, from a printed table."""


@pytest.mark.parametrize(
    "values", [[1.0, 2.0], [1.0, 2.0, 4.0], [0.3, 0.1, 0.2, 0.5, 0.4], list(map(float, range(10)))]
)
def test_interval_matches_the_printed_table(values: list[float]) -> None:
    n = len(values)
    mean = sum(values) / n
    s = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    estimate = estimate_mean(values)
    assert estimate.mean == pytest.approx(mean)
    assert estimate.half_width == pytest.approx(T_975[n - 1] * s / math.sqrt(n), rel=1e-8)


def test_mean_of_three_seeds_by_hand() -> None:
    estimate = estimate_mean([1.50, 1.52, 1.54])  # s = 0.02, standard error 0.02 / sqrt(3) = 0.011547
    assert str(estimate) == "1.520 ± 0.050"
    assert estimate_mean([1.5]) == Estimate(1.5, None, None, 1)


def test_interval_coverage_and_p_values_under_the_null_hypothesis() -> None:
    draws = np.random.default_rng(0).normal(0.0, 1.0, (4000, 3))
    excluded = np.mean([estimate_mean(list(row)).excludes_zero for row in draws])
    assert excluded == pytest.approx(0.05, abs=0.01)
    p_values = [estimate_mean(list(row)).p or 0.0 for row in draws]
    assert np.mean(np.array(p_values) < 0.3) == pytest.approx(0.3, abs=0.025)  # uniform


def test_pairing_cancels_noise_shared_by_a_seed() -> None:
    baseline = {1: 1.0, 2: 2.0, 3: 3.0}
    values = {1: 0.9, 2: 1.88, 3: 2.89, 4: 0.0}
    assert paired_differences(values, baseline) == pytest.approx({1: -0.1, 2: -0.12, 3: -0.11})
    comparison = compare_to_baseline({7: values}, baseline, "minimize")[7]
    assert comparison.difference is not None
    assert comparison.difference.n == 3
    assert comparison.difference.mean == pytest.approx(-0.11)
    assert comparison.difference.half_width == pytest.approx(T_975[2] * 0.01 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "direction", "verdict"),
    [
        ({1: 0.9, 2: 1.88, 3: 2.89, 4: 0.0}, "minimize", "better"),
        ({1: 0.9, 2: 1.88, 3: 2.89, 4: 0.0}, "maximize", "worse"),
        ({1: 0.9, 2: 2.1, 3: 3.0}, "minimize", "within noise"),
        ({4: 1.0}, "minimize", "no common seed"),
        ({1: 0.1}, "minimize", "only one seed"),
        ({1: 1.0, 2: 2.0, 3: 3.0}, "minimize", "within noise"),  # identical to the baseline
    ],
)
def test_verdict_of_a_single_comparison(values: dict[int, float], direction: str, verdict: str) -> None:
    assert compare_to_baseline({0: values}, {1: 1.0, 2: 2.0, 3: 3.0}, direction)[0].verdict == verdict


def test_holm_correction_by_hand() -> None:
    # Of four, the smallest is multiplied by 4, the next by 3, and none may be below a smaller one.
    assert holm_correction([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_correction([0.9, 0.8]) == [1.0, 1.0]
    assert holm_correction([]) == []


def test_verdict_follows_the_corrected_p_value() -> None:
    """A difference that is significant by itself is within noise after Holm's correction.

    With two degrees of freedom, P(|T| > t) = 1 - t / sqrt(2 + t²). Trial 1: mean 0.10, standard error 0.02, t = 5,
    p = 0.03775. Trial 2: mean 0.001, standard error 0.01, p = 0.929. Trial 3: mean 0.5, standard error 0.01, t = 50,
    p = 0.0004. Corrected: 3 * 0.0004 = 0.0012; 2 * 0.03775 = 0.0755; 0.929.
    """
    baseline = {1: 1.0, 2: 1.0, 3: 1.0}

    def shifted(mean: float, error: float) -> dict[int, float]:
        deviation = error * math.sqrt(3)
        return {1: 1.0 + mean - deviation, 2: 1.0 + mean, 3: 1.0 + mean + deviation}

    values = {1: shifted(0.10, 0.02), 2: shifted(0.001, 0.01), 3: shifted(0.5, 0.01)}
    comparisons = compare_to_baseline(values, baseline, "minimize")
    first = comparisons[1]
    assert first.difference is not None
    assert first.difference.p == pytest.approx(1 - 5 / math.sqrt(27), rel=1e-6)
    assert first.difference.excludes_zero
    assert first.corrected_p == pytest.approx(2 * (1 - 5 / math.sqrt(27)), rel=1e-6)
    assert [comparisons[number].verdict for number in (1, 2, 3)] == ["within noise", "within noise", "worse"]
    assert [comparisons[number].significant for number in (1, 2, 3)] == [False, False, True]
    assert comparisons[3].corrected_p == pytest.approx(3 * (1 - 50 / math.sqrt(2502)), rel=1e-4)
    assert compare_to_baseline({1: values[1]}, baseline, "minimize")[1].verdict == "worse"
