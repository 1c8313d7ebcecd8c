"""Compute 95% confidence intervals for metrics: Wilson intervals for proportions, jackknife for all other metrics."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

NORMAL_QUANTILE: Final = 1.959963984540054
"""97.5% quantile of the standard normal distribution, which is the half-width of its central 95% interval."""
MAX_GROUPS: Final = 100
"""Maximum number of jackknife groups."""
ROUNDING_TOLERANCE: Final = 1e-12
"""Relative standard error up to which variation is attributed to rounding, and the metric is treated as constant."""
MIN_ROWS: Final = 30
"""Minimum number of rows for estimating intervals from rows.

If there are fewer rows, and some of them have several parts (see ``Measurements``), the parts are used instead.
"""

PartIndices = NDArray[np.intp]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Measurements:
    """Measurements on benchmark rows, or on parts of rows, with functions that compute metrics from the measurements.

    Attributes:
        row: Row index of each part in ascending order, intp array of shape (n,). A benchmark row has one part; a long
            document has several parts, one per window.
        n_rows: Number of rows.
        metrics: Function that computes the metrics over a subset of parts, given an intp array of their indices.
        shares: Names of metrics that are proportions of rows, such as accuracy.
        extra: Function that computes statistics without a confidence interval, such as counts and the chance level,
            over a subset of parts, given an intp array of their indices.
        limits: Lower and upper bounds of bounded metrics, keyed by name.
    """

    row: PartIndices
    n_rows: int
    metrics: Callable[[PartIndices], Metrics]
    shares: frozenset[str] = frozenset()
    extra: Callable[[PartIndices], dict[str, Any]] = lambda indices: {}
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, n_rows: int, *args: Any, **kwargs: Any) -> "Measurements":
        """Create measurements in which each row has one part."""
        return cls(np.arange(n_rows), n_rows, *args, **kwargs)


@dataclass(frozen=True)
class ScoreSummary:
    """Metrics with their confidence intervals.

    Attributes:
        rows: Number of rows.
        metrics: Metrics keyed by name.
        intervals: 95% confidence interval (lower, upper) of each metric, or None if it cannot be estimated. For metrics
            other than proportions, it cannot be estimated from a single sampling unit (see ``summarize``), or if the
            jackknife standard error is zero (up to rounding) or NaN.
        extra: Statistics without a confidence interval, keyed by name.
        from_parts: Whether the intervals are estimated from parts of rows, because there are too few rows.
    """

    rows: int
    metrics: Metrics
    intervals: dict[str, tuple[float, float] | None]
    extra: dict[str, Any]
    from_parts: bool = False


def summarize(measured: Measurements, rows: NDArray[np.bool_] | None = None) -> ScoreSummary:
    """Compute metrics with confidence intervals: Wilson for proportions, jackknife with Student's t for other metrics.

    The sampling unit is the row, because a similar benchmark would contain different rows. If there are fewer than
    ``MIN_ROWS`` rows and some rows have several parts, the sampling unit is the part. The intervals are then too
    narrow, because the parts of a document are correlated.

    Args:
        measured: Measurements of all rows.
        rows: Mask of the rows to include, at least one; bool array of shape (n_rows,). All rows by default.
    """
    kept = np.ones(measured.n_rows, dtype=bool) if rows is None else rows
    indices = np.flatnonzero(kept[measured.row])
    metrics, n = measured.metrics(indices), int(kept.sum())
    from_parts = n < MIN_ROWS and len(indices) > n
    unit = np.arange(len(measured.row)) if from_parts else measured.row
    spread, groups = (
        jackknife_standard_errors(measured.metrics, indices, unit),
        min(len(np.unique(unit[indices])), MAX_GROUPS),
    )

    def interval(name: str, value: float) -> tuple[float, float] | None:
        if name in measured.shares:
            return wilson_interval(value, n)
        if spread is None or not spread[name] > ROUNDING_TOLERANCE * max(1.0, abs(value)):  # also true for NaN
            return None
        low, high = measured.limits.get(name, (-math.inf, math.inf))
        half = student_t_quantile(groups - 1) * spread[name]
        return max(low, value - half), min(high, value + half)

    intervals = {name: interval(name, value) for name, value in metrics.items()}
    return ScoreSummary(n, metrics, intervals, measured.extra(indices), from_parts)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Compute Wilson's score interval for a proportion (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    The interval stays within 0 and 1, and has a positive width even if all rows are correct or all are wrong.

    Args:
        share: Observed proportion, from 0 to 1.
        n: Number of rows.
    """
    middle = (share + NORMAL_QUANTILE * NORMAL_QUANTILE / (2 * n)) / (1 + NORMAL_QUANTILE * NORMAL_QUANTILE / n)
    half = (
        NORMAL_QUANTILE
        / (1 + NORMAL_QUANTILE * NORMAL_QUANTILE / n)
        * math.sqrt(share * (1 - share) / n + NORMAL_QUANTILE * NORMAL_QUANTILE / (4 * n * n))
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def student_t_quantile(freedom: int) -> float:
    """Return the half-width of the central 95% interval of Student's t distribution, in standard errors.

    The result is exact for one and two degrees of freedom. For more degrees of freedom, it is approximated by a series
    expansion (Abramowitz and Stegun 1964, 26.7.5) with a relative error of at most 0.13%.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, v = NORMAL_QUANTILE, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def jackknife_standard_errors(
    metrics: Callable[[PartIndices], Metrics], indices: PartIndices, unit: PartIndices
) -> Metrics | None:
    """Compute the standard error of each metric with the delete-a-group jackknife.

    Sampling units are assigned to at most ``MAX_GROUPS`` groups, and each group is left out once (Shao and Tu 1995,
    https://doi.org/10.1007/978-1-4612-0795-5, section 2.3). The jackknife does not require random numbers. Unlike the
    bootstrap, it does not duplicate rows, which would increase the measured repetition of generated texts.

    Args:
        metrics: Function that computes the metrics over a subset of parts, given an intp array of their indices.
        indices: Indices of the parts to include, array of shape (m,).
        unit: Sampling-unit index of each part, array of shape (n,). All parts of a unit are in the same group.

    Returns:
        Standard errors keyed by metric, or None if there are fewer than two sampling units.
    """
    number = np.unique(unit[indices], return_inverse=True)[1]
    n = int(number.max(initial=-1)) + 1
    groups = min(n, MAX_GROUPS)
    if groups < 2:
        return None
    # Adjacent units may be similar, so they are assigned to different groups. Each group is then a sample of all units.
    without = [metrics(indices[number % groups != group]) for group in range(groups)]
    return {
        name: math.sqrt((groups - 1) * float(np.var([left[name] for left in without]))) for name in metrics(indices)
    }
