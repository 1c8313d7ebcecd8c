"""Search space of a sweep: each dimension is a list of choices or a numeric range."""

import itertools
import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lit_gpt_scratch.errors import UserError

FitFlags = dict[str, Any]
"""Values of ``fit`` flags, keyed by flag name without leading dashes."""
MAX_NUMBER: Final = 1e18
"""Maximum absolute value of a number in a sweep file; Optuna and PyTorch store integers in 64 bits."""
MAX_GRID_SIZE: Final = 10_000
"""Maximum number of combinations in a grid search; each combination is a trial with one run per seed."""
MAX_SHOWN: Final = 60
"""Maximum number of characters that an error message quotes from a value in a sweep file; the rest is omitted."""

Setting = str | float
"""Value of a dimension in one trial: the label of a choice, or a number in a range."""


class SearchDimension(ABC):
    """Dimension of the search space: one or more ``fit`` flags, and the settings that the sweep tries for them."""

    @property
    @abstractmethod
    def distribution(self) -> BaseDistribution:
        """Optuna distribution from which settings of the dimension are sampled."""

    @property
    @abstractmethod
    def baseline(self) -> Setting:
        """Default setting of the baseline, which the sweep file can override under ``baseline``."""

    @abstractmethod
    def grid(self) -> Sequence[Setting]:
        """Return the dimension's grid points in order, or an empty list if it is a range without a step."""

    @abstractmethod
    def to_flags(self, setting: Setting) -> FitFlags:
        """Return the ``fit`` flags for a setting."""

    @abstractmethod
    def contains(self, setting: Setting) -> bool:
        """Return whether ``setting`` is a valid value for this dimension."""

    @abstractmethod
    def example_settings(self) -> Sequence[Setting]:
        """Return a few settings; if ``fit`` accepts all of them, it accepts every setting of the dimension."""


@dataclass(frozen=True)
class Choices(SearchDimension):
    """A dimension with a list of choices: values of one flag, or named sets of flags.

    Args:
        options: Flags of each choice, keyed by label; the first choice is the default for the baseline.
    """

    options: Mapping[str, FitFlags]

    @property
    def distribution(self) -> BaseDistribution:
        """Categorical distribution over the labels, because Optuna cannot store values that are lists or classes."""
        return CategoricalDistribution(tuple(self.options))

    @property
    def baseline(self) -> Setting:
        """Label of the first choice."""
        return next(iter(self.options))

    def grid(self) -> Sequence[Setting]:
        """Return the labels of all choices, in the order in which the sweep file lists them."""
        return list(self.options)

    def to_flags(self, setting: Setting) -> FitFlags:
        """Return the ``fit`` flags of the choice whose label is ``setting``."""
        return dict(self.options[str(setting)])

    def contains(self, setting: Setting) -> bool:
        """Return whether a choice has the label ``setting``."""
        return setting in self.options

    def example_settings(self) -> Sequence[Setting]:
        """Return the labels of all choices."""
        return list(self.options)


@dataclass(frozen=True)
class NumericRange(SearchDimension):
    """A dimension with numbers between two inclusive bounds.

    Args:
        flag: Name of the ``fit`` flag that is set to the number.
        low: Lower bound; the range contains only integers if both bounds are integers.
        high: Upper bound.
        log: Whether to sample uniformly in log space.
        step: Distance between adjacent values. If None, the range cannot be used in a grid search.
    """

    flag: str
    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_integer(self) -> bool:
        """Whether the range contains only integers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    @property
    def distribution(self) -> BaseDistribution:
        """Integer or float distribution, depending on the bounds."""
        if self.is_integer:
            return IntDistribution(int(self.low), int(self._highest), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self._highest, log=self.log, step=self.step)

    @property
    def baseline(self) -> Setting:
        """Midpoint of the range.

        With ``log``, the midpoint is the geometric mean of the bounds. With ``step``, it is the middle grid value, or
        the higher of two middle grid values.
        """
        if self.step is not None:
            return self._at_step((self._last_step() + 1) // 2)
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(middle) if self.is_integer else middle

    def grid(self) -> Sequence[Setting]:
        """Return all grid points from low to high, or an empty list if ``step`` is None.

        Raises:
            UserError: There are more than ``MAX_GRID_SIZE`` values.
        """
        if self.step is not None and self._last_step() >= MAX_GRID_SIZE:
            raise UserError(f"vary: {self.flag} has {_count(self._last_step() + 1)} values; use a larger step")
        return [self._at_step(index) for index in range(self._last_step() + 1)] if self.step is not None else []

    def to_flags(self, setting: Setting) -> FitFlags:
        """Return the flag with the number as its value."""
        return {self.flag: setting}

    def contains(self, setting: Setting) -> bool:
        """Return whether a number is within the bounds and, if ``step`` is set, one of the grid values."""
        if isinstance(setting, str) or not self.low <= setting <= self.high or (self.is_integer and setting % 1):
            return False
        return self.step is None or setting == self._at_step(round((setting - self.low) / self.step))

    def example_settings(self) -> Sequence[Setting]:
        """Return the lowest and the highest value."""
        return [self.low, self._highest]

    @property
    def _highest(self) -> float:
        """Highest value in the range: the upper bound or, with ``step``, the last grid value."""
        return self.high if self.step is None else self._at_step(self._last_step())

    def _last_step(self) -> int:
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9)

    def _at_step(self, index: int) -> float:
        value = self.low + index * (self.step or 1)
        return value if self.is_integer else float(f"{value:.12g}")  # 0.1 + 2 * 0.1 is 0.3, not 0.30000000000000004


def parse_dimension(name: str, given: Any) -> SearchDimension:
    """Parse an entry of ``vary``: a list of values, a range ``{low, high, log, step}``, or flags keyed by label.

    Raises:
        UserError: The entry is invalid or empty.
    """
    where = f"vary: {name}"
    if isinstance(given, Mapping) and given.keys() & {"low", "high"}:
        return _parse_range(name, given)
    if isinstance(given, Mapping):
        for label, flags in given.items():
            if not isinstance(flags, Mapping):
                raise UserError(f"{where}: {label} is {shorten(flags)}; it must be a mapping of flags to values")
        return _parse_choices(where, [(format_label(label), dict(flags)) for label, flags in given.items()])
    if isinstance(given, list):
        return _parse_choices(where, [(format_label(value), {name: value}) for value in given])
    raise UserError(
        f"{where} is {shorten(given)}; it must be a list, a range {{low: ..., high: ...}}, or "
        "a mapping of labels to flags"
    )


def grid_product(dimensions: Mapping[str, SearchDimension]) -> list[dict[str, Setting]]:
    """Return every combination of settings; the last dimension changes fastest.

    Raises:
        UserError: A dimension is a range without a step, or there are more than ``MAX_GRID_SIZE`` combinations.
    """
    axes = {name: dimension.grid() for name, dimension in dimensions.items()}
    for name, axis in axes.items():
        if not axis:
            raise UserError(
                f"vary: {name} is a range without a step, which grid search cannot enumerate; "
                "set step, or list the values"
            )
    size = math.prod(map(len, axes.values()))
    if size > MAX_GRID_SIZE:
        raise UserError(
            f"vary: the grid has {_count(size)} combinations; list fewer settings, or set method to random or tpe"
        )
    return [dict(zip(axes, settings, strict=True)) for settings in itertools.product(*axes.values())]


def format_label(value: Any) -> str:
    """Return a short label for a flag value; the label of a class contains its name and arguments."""
    if isinstance(value, Mapping) and "class_path" in value:
        given = value.get("init_args")
        arguments = ", ".join(f"{n} {format_label(v)}" for n, v in given.items()) if isinstance(given, Mapping) else ""
        name = str(value["class_path"]).rpartition(".")[2]
        return f"{name} ({arguments})" if arguments else name
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def parse_number(where: str, given: Any) -> float:
    """Convert a value from a YAML file to a number; strings are accepted because PyYAML reads ``1e-4`` as a string.

    Raises:
        UserError: The value is not a finite number.
    """
    try:
        if isinstance(given, bool):
            raise ValueError
        value = given if isinstance(given, int) else float(given)
    except (TypeError, ValueError):
        raise UserError(f"{where} is {shorten(given)}; it must be a number") from None
    if not abs(value) <= MAX_NUMBER:
        raise UserError(f"{where} is {shorten(given)}; it must be finite and at most {MAX_NUMBER:g}")
    return value


def shorten(value: Any) -> str:
    """Format a value from a sweep file as short text for an error message, regardless of the value's size."""
    text = str(value) if not isinstance(value, int) or abs(value) < MAX_NUMBER else "a number with too many digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _count(n: int) -> str:
    return f"{n:,}" if n < 10**18 else "more than 10^18"


def _parse_choices(where: str, options: list[tuple[str, FitFlags]]) -> Choices:
    if not options:
        raise UserError(f"{where} has no choices; list at least one")
    for label, count in Counter(label for label, _ in options).items():
        if count > 1:
            raise UserError(f"{where} lists {shorten(label)} more than once; remove the duplicates")
    return Choices(dict(options))


def _parse_range(name: str, given: Mapping[str, Any]) -> NumericRange:
    where = f"vary: {name}"
    unknown = given.keys() - {"low", "high", "log", "step"}
    if unknown or not {"low", "high"} <= given.keys():
        raise UserError(
            f"{where}: a range consists of low, high, and optionally log and step, not {shorten(', '.join(given))}"
        )
    low, high = parse_number(f"{where}: low", given["low"]), parse_number(f"{where}: high", given["high"])
    step = None if given.get("step") is None else parse_number(f"{where}: step", given["step"])
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}: log is {shorten(log)}; it must be true or false")
    if not low < high:
        raise UserError(f"{where}: low is {low} and high is {high}; low must be less than high")
    if log and low <= 0:
        raise UserError(f"{where}: low is {low}; it must be positive if log is true")
    if step is not None and (log or not 0 < step <= high - low):
        raise UserError(f"{where}: step is {step}; it must be positive and at most high - low, and log must be false")
    if step is not None and (high - low) / step > MAX_NUMBER:
        raise UserError(f"{where}: step is {step}, which is too small for the range; use a larger step")
    return NumericRange(name, low, high, log, step)
