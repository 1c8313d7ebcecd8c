"""What is known of a run: the curves and notes that TensorBoard has, by their names, as far as it has come."""

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Final

MAX_POINTS: Final = 2000
"""Points of a curve that are kept; of a longer one every other of its older half goes."""


class Curve:
    """Points of one measurement, in the order of their steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []

    def __len__(self) -> int:
        return len(self.steps)

    def add(self, step: int, value: float) -> None:
        """The next point; one of the same step takes the place of that before."""
        if self.steps and self.steps[-1] == step:
            self.values[-1] = value
            return
        self.steps.append(step)
        self.values.append(value)
        if len(self) > MAX_POINTS:
            del self.steps[1 : MAX_POINTS // 2 : 2], self.values[1 : MAX_POINTS // 2 : 2]

    def forget(self, step: int) -> None:
        """Drop the points from a step on."""
        kept = next((place for place, at in enumerate(self.steps) if at >= step), len(self))
        del self.steps[kept:], self.values[kept:]

    @property
    def last(self) -> float:
        """The newest value, NaN where there is none."""
        return self.values[-1] if self.values else math.nan

    @property
    def step(self) -> int:
        """That of the newest point, -1 where there is none."""
        return self.steps[-1] if self.steps else -1

    def median(self, newest: int, before: int = 0) -> float:
        """Median of the newest points but for the last ``before``, of those that are finite; NaN of none."""
        stop = len(self) - before
        return _median(self.values[max(0, stop - newest) : max(0, stop)])

    def medians(self, width: int) -> Iterator[tuple[int, float]]:
        """The median of each ``width`` neighbours, with the step of the last of them, where some are finite."""
        for end in range(width, len(self) + 1):
            median = _median(self.values[end - width : end])
            if math.isfinite(median):
                yield self.steps[end - 1], median


def _median(values: list[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.median(known) if known else math.nan


class MetricHistory:
    """Curves and notes of a run, and whether it is over.

    Attributes:
        step: As TensorBoard numbers it, from 0: that of the newest point.
        over: Whether nothing more will come.
    """

    def __init__(self) -> None:
        self.step = -1
        self.over = False
        self._curves: dict[str, Curve] = {}
        self._notes: dict[str, dict[int, str]] = {}

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """Points of several curves at one step."""
        self.step = step
        for name, value in values.items():
            self[name].add(step, value)

    def note(self, step: int, name: str, text: str) -> None:
        """A text under a name, as TensorBoard has samples."""
        self._notes.setdefault(name, {})[step] = text

    def forget(self, step: int) -> None:
        """Drop what is from a step on: a run that goes on from a checkpoint does it again."""
        for curve in self._curves.values():
            curve.forget(step)
        for name, notes in self._notes.items():
            self._notes[name] = {at: text for at, text in notes.items() if at < step}
        self.step = min(self.step, step - 1)

    def __getitem__(self, name: str) -> Curve:
        """A curve, without points where nothing of its name was measured."""
        return self._curves.setdefault(name, Curve())

    def fact(self, name: str) -> float:
        """The newest value of a name; NaN where there is none, so that no comparison with it holds."""
        return self[name].last

    def text(self, name: str, step: int) -> str:
        """The note of a step, or nothing."""
        return self._notes.get(name, {}).get(step, "")
