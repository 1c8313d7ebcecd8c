"""One thing that a sweep varies: some alternatives, or a range of numbers."""

import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lit_gpt_scratch.errors import UserError

Flags = dict[str, Any]
"""Flags of ``fit`` by their names, without dashes."""
Setting = str | float
"""What a dimension is set to: the label of an alternative, or a number of a range."""


class SearchDimension(ABC):
    """What a trial chooses one of."""

    @property
    @abstractmethod
    def distribution(self) -> BaseDistribution:
        """As Optuna samples and stores it."""

    @property
    @abstractmethod
    def baseline(self) -> Setting:
        """What others are compared with, unless the file says otherwise."""

    @abstractmethod
    def grid(self) -> Sequence[Setting]:
        """All settings of a grid, the baseline first where there is no order; none if they cannot be counted."""

    @abstractmethod
    def flags(self, setting: Setting) -> Flags:
        """What a setting means to ``fit``."""

    @abstractmethod
    def holds(self, setting: Setting) -> bool:
        """Whether it is one to choose from."""

    @abstractmethod
    def samples(self) -> Sequence[Setting]:
        """Enough settings to see whether ``fit`` takes them."""


@dataclass(frozen=True)
class Choices(SearchDimension):
    """A list in the file: each value of one flag, or each name with flags of its own.

    Args:
        options: By label, which flags it sets; the first is the baseline.
    """

    options: Mapping[str, Flags]

    @property
    def distribution(self) -> BaseDistribution:
        """Labels: Optuna stores no lists and no classes."""
        return CategoricalDistribution(tuple(self.options))

    @property
    def baseline(self) -> Setting:
        """The first."""
        return next(iter(self.options))

    def grid(self) -> Sequence[Setting]:
        """All, in their order."""
        return list(self.options)

    def flags(self, setting: Setting) -> Flags:
        """Those of the label."""
        return dict(self.options[str(setting)])

    def holds(self, setting: Setting) -> bool:
        """Whether there is such a label."""
        return setting in self.options

    def samples(self) -> Sequence[Setting]:
        """All."""
        return list(self.options)


@dataclass(frozen=True)
class NumericRange(SearchDimension):
    """Numbers between two others, both included.

    Args:
        flag: That they are given to.
        low: The least; whole numbers if this and ``high`` are.
        high: The greatest.
        log: Search evenly over orders of magnitude.
        step: Distance of neighbours; without it any number.
    """

    flag: str
    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether all are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    @property
    def distribution(self) -> BaseDistribution:
        """Whole or not, as the bounds are."""
        high = self.high if self.step is None else self._on_step(self._steps())
        if self.whole:
            return IntDistribution(int(self.low), int(high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, high, log=self.log, step=self.step)

    @property
    def baseline(self) -> Setting:
        """The middle, of the orders of magnitude where these are what is searched; on a step, if there are steps."""
        if self.step is not None:
            return self._on_step((self._steps() + 1) // 2)
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(middle) if self.whole else middle

    def grid(self) -> Sequence[Setting]:
        """Every step, if there are steps."""
        return [self._on_step(place) for place in range(self._steps() + 1)] if self.step is not None else []

    def flags(self, setting: Setting) -> Flags:
        """The number, for the one flag."""
        return {self.flag: setting}

    def holds(self, setting: Setting) -> bool:
        """Whether it lies between, and on a step if there are steps."""
        within = not isinstance(setting, str) and self.low <= setting <= self.high
        return within and (setting in self.grid() or self.step is None) and not (self.whole and setting % 1)

    def samples(self) -> Sequence[Setting]:
        """Both ends."""
        return [self.low, self.high]

    def _steps(self) -> int:
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9)

    def _on_step(self, place: int) -> float:
        number = self.low + place * (self.step or 1)
        return number if self.whole else float(f"{number:.12g}")  # 0.1 + 2 * 0.1 is not what one would write


def dimension(name: str, given: Any) -> SearchDimension:
    """What the file says under ``vary``: a list, ``{low, high, log, step}``, or flags by names of one's own.

    Raises:
        UserError: It is something else, or there is nothing to choose from.
    """
    where = f"vary: {name}"
    if isinstance(given, Mapping) and given.keys() & {"low", "high"}:
        return _range(name, given)
    if isinstance(given, Mapping):
        for label, flags in given.items():
            if not isinstance(flags, Mapping):
                raise UserError(f"{where}: {label} is {flags}; write the flags that it stands for, as a mapping")
        return _alternatives(where, [(format_label(label), dict(flags)) for label, flags in given.items()])
    if isinstance(given, list):
        return _alternatives(where, [(format_label(value), {name: value}) for value in given])
    raise UserError(f"{where} is {given}; it must be a list, a range {{low: ..., high: ...}}, or flags by name")


def product(dimensions: Mapping[str, SearchDimension]) -> list[dict[str, Setting]]:
    """Every combination; the last dimension changes fastest.

    Raises:
        UserError: A dimension cannot be counted.
    """
    axes = {name: each.grid() for name, each in dimensions.items()}
    for name, axis in axes.items():
        if not axis:
            raise UserError(f"vary: {name} is a range without a step, which is no grid; give it a step, or list values")
    return [dict(zip(axes, settings, strict=True)) for settings in itertools.product(*axes.values())]


def format_label(value: Any) -> str:
    """A value in few words: of a class its name."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = ", ".join(f"{name} {format_label(each)}" for name, each in (value.get("init_args") or {}).items())
        name = str(value["class_path"]).rpartition(".")[2]
        return f"{name} ({arguments})" if arguments else name
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def _alternatives(where: str, options: list[tuple[str, Flags]]) -> Choices:
    if not options:
        raise UserError(f"{where} has nothing to choose from: the grid is empty")
    labels = [label for label, _ in options]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{where} has {label} twice")
    return Choices(dict(options))


def _range(name: str, given: Mapping[str, Any]) -> NumericRange:
    where = f"vary: {name}"
    unknown = given.keys() - {"low", "high", "log", "step"}
    if unknown or not {"low", "high"} <= given.keys():
        raise UserError(f"{where}: a range has low, high, and perhaps log and step, not {', '.join(map(str, given))}")
    low, high = number(f"{where}: low", given["low"]), number(f"{where}: high", given["high"])
    step = None if given.get("step") is None else number(f"{where}: step", given["step"])
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}: log is {log}; it must be true or false")
    if not low < high:
        raise UserError(f"{where}: low is {low}, and high {high}; the range is empty")
    if log and low <= 0:
        raise UserError(f"{where}: low is {low}; it must be positive where log is true")
    if step is not None and (log or not 0 < step <= high - low):
        raise UserError(f"{where}: step is {step}; it must be positive, fit between low and high, and not go with log")
    return NumericRange(name, low, high, log, step)


def number(where: str, given: Any) -> float:
    """A number of a YAML file, in which 1e-4 is a text.

    Raises:
        UserError: It is none, or not finite.
    """
    try:
        if isinstance(given, bool):
            raise ValueError
        value = given if isinstance(given, int) else float(given)
    except (TypeError, ValueError):
        raise UserError(f"{where} is {given}; it must be a number") from None
    if not math.isfinite(value):
        raise UserError(f"{where} is {given}; it must be finite")
    return value
