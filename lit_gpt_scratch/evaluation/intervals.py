"""Confidence intervals (95%) of evaluation metrics: Wilson for shares, the jackknife for all others."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

NORMAL_QUANTILE: Final = 1.959963984540054
"""95% of a normal distribution are within this many standard deviations."""
MAX_GROUPS: Final = 100
"""Maximum number of jackknife groups."""
ROUNDING_TOLERANCE: Final = 1e-12
"""Relative spread up to which a metric counts as constant: it is due to another order of additions."""
MIN_ROWS: Final = 30
"""Minimum number of rows to estimate the spread from; for fewer rows, their parts are used if there are any."""

PartIndices = NDArray[np.intp]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Measurements:
    """Per-part measurements of an evaluation, and how metrics are computed from them.

    Attributes:
        row: Row index of each measured part, (n,) intp, ascending. A benchmark row is one part; a long document has
            several parts, its windows.
        n_rows: Number of rows.
        metrics: Computes the metrics over the parts with these indices, (m,) intp.
        shares: Names of metrics that are a share of rows, such as an accuracy.
        extra: Computes values without an interval, such as counts and the chance level.
        limits: Lower and upper bound of metrics that have one, by name.
    """

    row: PartIndices
    n_rows: int
    metrics: Callable[[PartIndices], Metrics]
    shares: frozenset[str] = frozenset()
    extra: Callable[[PartIndices], dict[str, Any]] = lambda indices: {}
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, n_rows: int, *args: Any, **kwargs: Any) -> "Measurements":
        """Measurements of rows with one part each."""
        return cls(np.arange(n_rows), n_rows, *args, **kwargs)


@dataclass(frozen=True)
class ScoreSummary:
    """Metrics with their confidence intervals.

    Attributes:
        rows: Number of rows.
        metrics: Values by name.
        intervals: Lower and upper end of each metric's 95% confidence interval. None if it is unknown: for a single
            row, or if the metric does not depend on the rows left out, e.g. when all rows have the same value. The
            true value is then probably near, but how near is unknown.
        extra: Values without an interval.
        from_parts: Whether the intervals are from the spread among parts of rows, because there are too few rows.
    """

    rows: int
    metrics: Metrics
    intervals: dict[str, tuple[float, float] | None]
    extra: dict[str, Any]
    from_parts: bool = False


def summarize(measured: Measurements, rows: NDArray[np.bool_] | None = None) -> ScoreSummary:
    """Metrics with their intervals: Wilson's for a share, the jackknife with Student's t for all others.

    Rows are the unit of sampling: a similar benchmark would have other rows. If there are fewer than ``MIN_ROWS`` and
    they have parts, the parts are the unit; parts of one document are similar, so the interval is then too narrow.

    Args:
        measured: Measurements of all rows.
        rows: Rows to include, (n_rows,) bool, at least one; all by default.
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
        if spread is None or not spread[name] > ROUNDING_TOLERANCE * max(1.0, abs(value)):  # true for NaN, too
            return None
        low, high = measured.limits.get(name, (-math.inf, math.inf))
        half = student_t_quantile(groups - 1) * spread[name]
        return max(low, value - half), min(high, value + half)

    intervals = {name: interval(name, value) for name, value in metrics.items()}
    return ScoreSummary(n, metrics, intervals, measured.extra(indices), from_parts)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share of n rows (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    It stays within 0 and 1, and has a positive width even if all rows are right or all are wrong.
    """
    middle = (share + NORMAL_QUANTILE * NORMAL_QUANTILE / (2 * n)) / (1 + NORMAL_QUANTILE * NORMAL_QUANTILE / n)
    half = (
        NORMAL_QUANTILE
        / (1 + NORMAL_QUANTILE * NORMAL_QUANTILE / n)
        * math.sqrt(share * (1 - share) / n + NORMAL_QUANTILE * NORMAL_QUANTILE / (4 * n * n))
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def student_t_quantile(freedom: int) -> float:
    """Half-width of the central 95% interval of Student's t distribution, in standard errors.

    Exact for one and two degrees of freedom; for more, an expansion in their inverse (Abramowitz and Stegun 1964,
    26.7.5) with an error of at most 0.13%.

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
    """Standard error of each metric by the delete-a-group jackknife.

    Units are assigned to at most ``MAX_GROUPS`` groups, and each group is left out once (Shao and Tu 1995,
    https://doi.org/10.1007/978-1-4612-0795-5, section 2.3). It needs no random numbers and, unlike the bootstrap,
    repeats no row, which would make texts look more repetitive than they are.

    Args:
        metrics: Computes the metrics over the parts with given indices.
        indices: Indices of the parts to include, (m,).
        unit: Unit of each part, (n,); parts of one unit are left out together.

    Returns:
        None for fewer than two units.
    """
    number = np.unique(unit[indices], return_inverse=True)[1]
    n = int(number.max(initial=-1)) + 1
    groups = min(n, MAX_GROUPS)
    if groups < 2:
        return None
    # Adjacent units may be similar and go to different groups, so each group is a sample of the whole.
    without = [metrics(indices[number % groups != group]) for group in range(groups)]
    return {
        name: math.sqrt((groups - 1) * float(np.var([left[name] for left in without]))) for name in metrics(indices)
    }
