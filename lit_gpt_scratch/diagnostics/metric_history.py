"""The metrics and texts of a run so far, by their names in TensorBoard."""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Final

MAX_POINTS: Final = 2000
"""Points kept of a curve; of a longer one every other point of the older half is dropped."""


class MetricCurve:
    """Points of one metric, ordered by step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, value: float) -> None:
        """Append a point; one of the same step replaces the last."""
        if self.steps and self.steps[-1] == step:
            self.values[-1] = value
            return
        self.steps.append(step)
        self.values.append(value)
        if len(self) > MAX_POINTS:
            del self.steps[1 : MAX_POINTS // 2 : 2], self.values[1 : MAX_POINTS // 2 : 2]

    def drop_from(self, step: int) -> None:
        """Drop the points from a step on."""
        kept = next((place for place, at in enumerate(self.steps) if at >= step), len(self))
        del self.steps[kept:], self.values[kept:]

    @property
    def last(self) -> float:
        """The newest value; NaN if there is none."""
        return self.values[-1] if self.values else math.nan

    @property
    def step(self) -> int:
        """Step of the newest point; -1 if there is none."""
        return self.steps[-1] if self.steps else -1

    def median(self, newest: int, before: int = 0) -> float:
        """Median of the ``newest`` points that are finite, without the last ``before``; NaN if there are none."""
        stop = len(self) - before
        return _finite_median(self.values[max(0, stop - newest) : max(0, stop)])

    def rolling_medians(self, width: int) -> Iterator[tuple[int, float]]:
        """Median of the finite values of each ``width`` neighbours, with the step of the last of them."""
        for end in range(width, len(self) + 1):
            median = _finite_median(self.values[end - width : end])
            if math.isfinite(median):
                yield self.steps[end - 1], median


def _finite_median(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


class MetricHistory:
    """Curves and texts of a run.

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
        """Add a point of several curves."""
        self.step = step
        for name, value in values.items():
            self[name].add(step, value)

    def add_text(self, step: int, name: str, text: str) -> None:
        """Add a text under a name."""
        self._texts.setdefault(name, {})[step] = text

    def drop_from(self, step: int) -> None:
        """Drop everything from a step on."""
        for curve in self._curves.values():
            curve.drop_from(step)
        for name, texts in self._texts.items():
            self._texts[name] = {at: text for at, text in texts.items() if at < step}
        self.step = min(self.step, step - 1)

    def __getitem__(self, name: str) -> MetricCurve:
        """A curve; empty if there is no metric of that name."""
        return self._curves.setdefault(name, MetricCurve())

    def latest(self, name: str) -> float:
        """Newest value of a metric; NaN if there is none, so that every comparison with it is false."""
        return self[name].last

    def text(self, name: str, step: int) -> str:
        """Text of a step; empty if there is none."""
        return self._texts.get(name, {}).get(step, "")
