"""History of the metrics and text logged by a run, keyed by TensorBoard tag."""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Final

MAX_POINTS: Final = 2000
"""Maximum number of points per curve; if exceeded, every other point of the older half is dropped."""


class MetricCurve:
    """Points of one metric, ordered by step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, value: float) -> None:
        """Append a point; if the last point has the same step, replace it."""
        if self.steps and self.steps[-1] == step:
            self.values[-1] = value
            return
        self.steps.append(step)
        self.values.append(value)
        if len(self) > MAX_POINTS:
            del self.steps[1 : MAX_POINTS // 2 : 2], self.values[1 : MAX_POINTS // 2 : 2]

    def drop_from(self, step: int) -> None:
        """Drop all points at or after a step."""
        kept = next((place for place, at in enumerate(self.steps) if at >= step), len(self))
        del self.steps[kept:], self.values[kept:]

    @property
    def last(self) -> float:
        """Newest value, or NaN if there is none."""
        return self.values[-1] if self.values else math.nan

    @property
    def step(self) -> int:
        """Step of the newest point, or -1 if there is none."""
        return self.steps[-1] if self.steps else -1

    def median(self, newest: int, before: int = 0) -> float:
        """Return the median of the finite values among recent points, or NaN if there are none.

        Args:
            newest: Number of points to include.
            before: Number of points at the end of the curve to exclude; the ``newest`` points before them are included.
        """
        stop = len(self) - before
        return _finite_median(self.values[max(0, stop - newest) : max(0, stop)])

    def rolling_medians(self, width: int) -> Iterator[tuple[int, float]]:
        """For each window of ``width`` points, yield its last step and the median of its finite values."""
        for end in range(width, len(self) + 1):
            median = _finite_median(self.values[end - width : end])
            if math.isfinite(median):
                yield self.steps[end - 1], median


def _finite_median(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


class MetricHistory:
    """Metric curves and logged text of a run.

    Attributes:
        step: Step of the newest point, counted from 0 as in TensorBoard.
        is_over: Whether the run has ended.
    """

    def __init__(self) -> None:
        self.step = -1
        self.is_over = False
        self._curves: dict[str, MetricCurve] = {}
        self._texts: dict[str, dict[int, str]] = {}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to the curve of each metric in ``values``."""
        self.step = step
        for name, value in values.items():
            self[name].add(step, value)

    def add_text(self, step: int, name: str, text: str) -> None:
        """Add the text logged as ``name`` at ``step``."""
        self._texts.setdefault(name, {})[step] = text

    def drop_from(self, step: int) -> None:
        """Drop all points and text logged at or after a step."""
        for curve in self._curves.values():
            curve.drop_from(step)
        for name, texts in self._texts.items():
            self._texts[name] = {at: text for at, text in texts.items() if at < step}
        self.step = min(self.step, step - 1)

    def __getitem__(self, name: str) -> MetricCurve:
        """Return a metric's curve, or an empty curve if the metric has not been logged."""
        return self._curves.setdefault(name, MetricCurve())

    def latest(self, name: str) -> float:
        """Return the newest value of a metric; if it has not been logged, return NaN, so that comparisons are false."""
        return self[name].last

    def text(self, name: str, step: int) -> str:
        """Return the text logged as ``name`` at ``step``, or an empty string if there is none."""
        return self._texts.get(name, {}).get(step, "")
