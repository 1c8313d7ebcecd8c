"""Statistics over a few seeds: Student's t confidence intervals, paired differences, and Holm's correction.

Student, The probable error of a mean, Biometrika 6 (1908); Holm, A simple sequentially rejective multiple test
procedure, Scandinavian Journal of Statistics 6 (1979).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

from scipy.special import stdtr, stdtrit

CONFIDENCE: Final = 0.95
ALPHA: Final = 1 - CONFIDENCE
"""Significance level for p-values after Holm's correction."""
WITHIN_NOISE: Final = "within noise"


@dataclass(frozen=True)
class Estimate:
    """Estimate of a mean, with its confidence interval and p-value.

    Args:
        mean: Mean of the values.
        half_width: Half the width of the 95% confidence interval, or None for a single value.
        p: Two-sided p-value for the null hypothesis that the true mean is 0, or None for a single value.
        n: Number of values.
    """

    mean: float
    half_width: float | None
    p: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the confidence interval excludes 0, without correction for multiple comparisons."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def __str__(self) -> str:
        """Return ``mean ± half width``, rounded to two significant digits of the half width (at most five decimals)."""
        if self.half_width is None:
            return f"{self.mean:.4g}"
        digits = max(0, min(5, 1 - math.floor(math.log10(self.half_width)))) if self.half_width > 0 else 4
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"


@dataclass(frozen=True)
class Comparison:
    """Comparison of a trial with the baseline.

    Args:
        difference: Mean of the per-seed differences from the baseline, or None if the trial and the baseline have no
            seed in common.
        corrected_p: p-value after Holm's correction over all compared trials, or None if fewer than two seeds are in
            common.
        verdict: ``better`` or ``worse`` if the corrected p-value is below 0.05, otherwise ``within noise``. If
            no test is possible, the reason, such as ``only one seed``.
    """

    difference: Estimate | None
    corrected_p: float | None
    verdict: str

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.corrected_p is not None and self.corrected_p < ALPHA


def estimate_mean(values: Sequence[float]) -> Estimate:
    """Estimate the mean of normally distributed values with a 95% confidence interval.

    The interval is ``mean ± t(0.975, n - 1) s / √n``, with the sample standard deviation ``s``.
    """
    n = len(values)
    if n < 2:
        return Estimate(fmean(values), None, None, n)
    mean, error = fmean(values), stdev(values) / math.sqrt(n)
    half_width = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Estimate(mean, half_width, p, n)


def paired_differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """Return the differences ``values - baseline``, keyed by seed, for the seeds that occur in both.

    Runs with the same seed see the same samples in the same order, so much of the noise cancels in the difference.
    """
    return {seed: values[seed] - baseline[seed] for seed in values if seed in baseline}


def holm_correction(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple comparisons (Holm 1979) and return them in the order of the input."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def compare_to_baseline(
    values: Mapping[int, Mapping[int, float]], baseline: Mapping[int, float], direction: str
) -> dict[int, Comparison]:
    """Compare each trial with the baseline using a paired t-test, with Holm's correction over all trials.

    Args:
        values: Metric of each trial except the baseline, keyed by trial number and then by seed.
        baseline: Metric of the baseline, keyed by seed.
        direction: Whether to ``minimize`` or ``maximize`` the metric.

    Returns:
        Comparisons keyed by trial number.
    """
    estimates: dict[int, Estimate | None] = {}
    for number, by_seed in values.items():
        differences = list(paired_differences(by_seed, baseline).values())
        estimates[number] = estimate_mean(differences) if differences else None
    p_values = {number: each.p for number, each in estimates.items() if each is not None and each.p is not None}
    corrected = dict(zip(p_values, holm_correction(list(p_values.values())), strict=True))
    return {
        number: Comparison(each, corrected.get(number), _verdict(each, corrected.get(number), direction))
        for number, each in estimates.items()
    }


def _verdict(difference: Estimate | None, corrected_p: float | None, direction: str) -> str:
    if difference is None:
        return "no common seed"
    if corrected_p is None:
        return "only one seed"
    if corrected_p >= ALPHA:
        return WITHIN_NOISE
    return "better" if (difference.mean < 0) == (direction == "minimize") else "worse"
