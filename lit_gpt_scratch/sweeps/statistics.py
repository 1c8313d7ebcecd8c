"""What a few seeds allow to say: Student's t, for means and for differences of pairs.

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


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far off it may be.

    Args:
        mean: Of the values.
        half: Half the width of its confidence interval; None of a single value.
        p: How likely so large a mean is where the true one is 0 (two-sided); None of a single value.
        n: How many values.
    """

    mean: float
    half: float | None
    p: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.half is not None and abs(self.mean) > self.half

    def __str__(self) -> str:
        """As a table has it, to the digits that the interval leaves."""
        if self.half is None:
            return f"{self.mean:.4g}"
        digits = max(0, min(5, 1 - math.floor(math.log10(self.half)))) if self.half > 0 else 4
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and confidence interval of values that are normally distributed: mean ± t(0.975, n - 1) s / √n."""
    n = len(values)
    if n < 2:
        return Estimate(fmean(values), None, None, n)
    mean, error = fmean(values), stdev(values) / math.sqrt(n)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Estimate(mean, half, p, n)


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """The difference to the baseline, by the seeds that both have; None if there are none.

    Runs of one seed see the same windows in the same order, so that much of the noise is common to both.
    """
    shared = [seed for seed in values if seed in baseline]
    return estimate([values[seed] - baseline[seed] for seed in shared]) if shared else None


def holm(ps: Sequence[float]) -> list[float]:
    """The same probabilities, corrected for that several comparisons were made (Holm 1979)."""
    corrected, least = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = least
    return corrected


def verdict(difference: Estimate | None, direction: str) -> str:
    """What a difference to the baseline says, in words."""
    if difference is None:
        return "not comparable: no common seed"
    if difference.half is None:
        return "not known: one seed"
    if not difference.excludes_zero:
        return "within noise"
    return "better" if (difference.mean < 0) == (direction == "minimize") else "worse"
