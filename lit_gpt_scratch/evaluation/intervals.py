"""What is known of a model's scores when so many rows were asked: metrics, each with a 95% confidence interval."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

NORMAL_QUANTILE: Final = 1.959963984540054
"""Of a normal distribution, 95% lie within so many standard deviations."""
MAX_GROUPS: Final = 100
ROUNDING_TOLERANCE: Final = 1e-12
"""Spreads up to this part of a figure come of adding in another order."""
MIN_ROWS: Final = 30
"""Rows from which on the spread among them says enough; of fewer, their parts are asked, where they have any."""

PartIndices = NDArray[np.intp]
Metrics = dict[str, float]


@dataclass(frozen=True)
class Measurements:
    """What was found out about each of some rows, and how figures come of it.

    Attributes:
        row: For each part that was measured the number of its row, (n,) intp, in order. A row of a benchmark is one
            part; a long document has several, its windows.
        n_rows: Rows.
        metrics: Of the parts with these numbers, (m,) intp.
        shares: Names of those figures that are a share of rows, as an accuracy is.
        extra: What has no interval: counts, chance.
        limits: Between what those figures are that cannot have every value, by their names.
    """

    row: PartIndices
    n_rows: int
    metrics: Callable[[PartIndices], Metrics]
    shares: frozenset[str] = frozenset()
    extra: Callable[[PartIndices], dict[str, Any]] = lambda places: {}
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def from_rows(cls, n_rows: int, *args: Any, **kwargs: Any) -> "Measurements":
        """Rows of one part each."""
        return cls(np.arange(n_rows), n_rows, *args, **kwargs)


@dataclass(frozen=True)
class ScoreSummary:
    """Figures and what they are worth.

    Attributes:
        rows: How many rows they are of.
        metrics: By name.
        intervals: Lower and upper end of each figure's 95% confidence interval, or None where nothing is known of it:
            of a single row, or where the figure is the same whatever rows are left out, as one is of which all are
            right. That says that the truth is near, and not how near.
        extra: As they were measured.
        from_parts: Whether the intervals are from the spread among parts of rows, as rows were too few.
    """

    rows: int
    metrics: Metrics
    intervals: dict[str, tuple[float, float] | None]
    extra: dict[str, Any]
    from_parts: bool = False


def summarize(measured: Measurements, rows: NDArray[np.bool_] | None = None) -> ScoreSummary:
    """Figures of rows with their intervals: Wilson's of a share, the jackknife's with Student's t of all others.

    Rows are what varies: another benchmark of the kind would have others. Where there are fewer than ``MIN_ROWS``, and
    they have parts, the parts are taken for it; those of a document are alike, so the interval is then too narrow.

    Args:
        measured: Of all rows.
        rows: Which of them count, (n_rows,) bool; all by default, and one at least.
    """
    kept = np.ones(measured.n_rows, dtype=bool) if rows is None else rows
    places = np.flatnonzero(kept[measured.row])
    metrics, n = measured.metrics(places), int(kept.sum())
    from_parts = n < MIN_ROWS and len(places) > n
    unit = np.arange(len(measured.row)) if from_parts else measured.row
    spread, groups = (
        jackknife_standard_errors(measured.metrics, places, unit),
        min(len(np.unique(unit[places])), MAX_GROUPS),
    )

    def interval(name: str, value: float) -> tuple[float, float] | None:
        if name in measured.shares:
            return wilson_interval(value, n)
        if spread is None or not spread[name] > ROUNDING_TOLERANCE * max(1.0, abs(value)):  # NaN is not, either
            return None
        low, high = measured.limits.get(name, (-math.inf, math.inf))
        half = student_t_quantile(groups - 1) * spread[name]
        return max(low, value - half), min(high, value + half)

    intervals = {name: interval(name, value) for name, value in metrics.items()}
    return ScoreSummary(n, metrics, intervals, measured.extra(places), from_parts)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The score interval of a share of n (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    It stays within 0 and 1, and does not shrink to nothing where all rows are right, or none is.
    """
    middle = (share + NORMAL_QUANTILE * NORMAL_QUANTILE / (2 * n)) / (1 + NORMAL_QUANTILE * NORMAL_QUANTILE / n)
    half = (
        NORMAL_QUANTILE
        / (1 + NORMAL_QUANTILE * NORMAL_QUANTILE / n)
        * math.sqrt(share * (1 - share) / n + NORMAL_QUANTILE * NORMAL_QUANTILE / (4 * n * n))
    )
    return max(0.0, middle - half), min(1.0, middle + half)


def student_t_quantile(freedom: int) -> float:
    """How many standard errors about a mean hold 95% of Student's t with so many degrees of freedom, at least 1.

    Exact of one and two; of more, the expansion in their inverse (Abramowitz and Stegun 1964, 26.7.5), which is then
    right to 0.13%.
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
    metrics: Callable[[PartIndices], Metrics], places: PartIndices, unit: PartIndices
) -> Metrics | None:
    """The standard error of each figure, from how it changes when a share of the units is left out.

    Units are dealt out to at most ``MAX_GROUPS`` groups, and each group is left out once (the delete-a-group jackknife,
    Shao and Tu 1995, https://doi.org/10.1007/978-1-4612-0795-5, section 2.3). It needs no random numbers, and unlike
    the bootstrap repeats no row, which would make texts look more repetitive than they are.

    Args:
        metrics: Of the parts with these numbers.
        places: Numbers of the parts that count, (m,).
        unit: For each part, what it is left out together with, (n,).

    Returns:
        None of fewer than two units.
    """
    number = np.unique(unit[places], return_inverse=True)[1]
    n = int(number.max(initial=-1)) + 1
    groups = min(n, MAX_GROUPS)
    if groups < 2:
        return None
    # Neighbours, which may be alike, go to different groups; so each is a sample of the whole.
    without = [metrics(places[number % groups != group]) for group in range(groups)]
    return {name: math.sqrt((groups - 1) * float(np.var([left[name] for left in without]))) for name in metrics(places)}
