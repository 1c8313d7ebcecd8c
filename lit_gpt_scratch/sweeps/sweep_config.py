"""Parse sweep files, which define the search space, the search method and the comparison with the baseline."""

import hashlib
import inspect
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import optuna

from lit_gpt_scratch.bounded_yaml import load_yaml
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import MAX_SEED
from lit_gpt_scratch.sweeps.scaling_law import MIN_SETTINGS
from lit_gpt_scratch.sweeps.search_space import (
    FitFlags,
    NumericRange,
    SearchDimension,
    Setting,
    format_label,
    grid_product,
    parse_dimension,
    parse_number,
    shorten,
)

METHODS: Final = ("grid", "random", "tpe")
DIRECTIONS: Final = ("minimize", "maximize")
RESERVED_FLAGS: Final = ("runs", "experiment", "ckpt_path", "seed_everything", "force", "plan", "devices_like")
"""Flags of ``fit`` that only the sweep may set."""
BUDGET_FLAGS: Final = {"steps": "trainer.max_steps", "tokens": "trainer.max_steps", "minutes": "trainer.max_time"}
"""Flag of ``fit`` that enforces a training budget, keyed by the unit of the budget."""
BUDGET_PREFIX: Final = "budget."
"""Prefix of a unit in ``BUDGET_FLAGS`` that is listed under ``vary`` like a flag, such as ``budget.tokens``."""

Assignment = dict[str, Setting]
"""Settings of one trial, keyed by the name of the search dimension."""


@dataclass(frozen=True)
class SweepConfig:
    """Parsed sweep file.

    Args:
        name: File name without suffix.
        question: Question that the sweep answers, from the comment at the top of the file.
        vary: Search dimensions, keyed by name.
        base: Config files that are passed to ``fit`` in all runs.
        fixed: Flags that are passed to ``fit`` in all runs; they override the config files.
        method: Search method: ``grid`` tries every combination, ``random`` samples uniformly, and ``tpe`` samples with
            Optuna's tree-structured Parzen estimator (https://papers.nips.cc/paper/4443).
        trials: Number of trials for ``random`` and ``tpe``, including the baseline.
        seeds: Random seeds; each trial has one run per seed.
        metric: Metric to optimize, a key in ``summary.json``; the value of a trial is the mean over its seeds.
        direction: Whether to ``minimize`` or ``maximize`` the metric.
        budget: Training budget per run, keyed by its unit: ``steps``, ``tokens`` or ``minutes``.
        pruning: Class name of an Optuna pruner, mapped to its arguments. The metric is reported to the pruner
            after each validation of the first seed's run; if that run is pruned, the remaining seeds are skipped.
        baseline: Settings of the baseline that differ from the defaults. By default, the baseline uses the first choice
            of each list and the midpoint of each range. The baseline is always the first trial.
        scaling: If set, the report fits a scaling law to sizes and training lengths. The setting of each dimension in
            ``hold_out``, if there is one, selects the trial that is executed last, after its loss has been predicted.

    Raises:
        UserError: A value is invalid, or contradicts another value.
    """

    # The name of a study contains a hash of these field names and values (see `fingerprint`), so a study can no longer
    # be found after a field is renamed.
    name: str
    question: str
    vary: Mapping[str, SearchDimension]
    base: tuple[Path, ...] = ()
    fixed: FitFlags = field(default_factory=dict)
    method: str = "grid"
    trials: int | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    metric: str = "val/bits_per_byte"
    direction: str = "minimize"
    budget: Mapping[str, float] = field(default_factory=dict)
    pruning: Mapping[str, Any] | None = None
    baseline: Assignment = field(default_factory=dict)
    scaling: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _require_one_of("method", self.method, METHODS)
        _require_one_of("direction", self.direction, DIRECTIONS)
        if not self.vary:
            raise UserError("vary is empty; it must contain at least one flag")
        distinct = len(set(self.seeds)) == len(self.seeds)
        if not self.seeds or not distinct or not all(0 <= seed <= MAX_SEED for seed in self.seeds):
            raise UserError(
                f"seeds are {shorten(list(self.seeds))}; at least one is required, and they must be distinct and "
                f"between 0 and {MAX_SEED}"
            )
        if self.method == "grid" and self.trials is not None:
            raise UserError(
                "trials is set, but grid search runs every combination; remove trials, or set method to random or tpe"
            )
        if self.method != "grid" and (self.trials is None or self.trials < 1):
            trials = shorten(self.trials)
            raise UserError(f"trials is {trials}; method {self.method} requires a positive number of trials")
        for path in self.base:
            _read_config_file(path)
        self._validate_flags()
        self._validate_baseline()
        self._validate_scaling()
        self.build_pruner()
        _ = self.predefined_assignments

    def _validate_flags(self) -> None:
        varied = [
            flag
            for dimension in self.vary.values()
            for setting in dimension.example_settings()
            for flag in dimension.to_flags(setting)
        ]
        for name in (*self.fixed, *varied):
            if name in RESERVED_FLAGS:
                hint = "use seeds instead" if name == "seed_everything" else "remove it"
                raise UserError(f"{name} is set by the sweep; {hint}")
            if name in self.fixed and name in varied:
                raise UserError(f"{name} is listed under both fixed and vary; remove one of the entries")
        units = dict.fromkeys(self.budget)
        for name, dimension in self.vary.items():
            for setting in dimension.example_settings():
                units |= dict.fromkeys(self.budget_of({name: setting}))
        _require_one_limit(units)
        for unit in units:
            if (flag := BUDGET_FLAGS.get(unit)) in (*self.fixed, *varied):
                raise UserError(
                    f"budget: {unit} sets {flag}, which is also listed under fixed or vary; remove one of them"
                )

    def _validate_baseline(self) -> None:
        for name, setting in self.baseline.items():
            if name not in self.vary:
                raise UserError(f"baseline: {name} is not listed under vary{suggest_closest(name, self.vary)}")
            if not self.vary[name].contains(setting):
                raise UserError(f"baseline: {name} is {setting}; it must be one of the settings under vary")

    def _validate_scaling(self) -> None:
        if self.scaling is None:
            return
        if unknown := self.scaling.keys() - {"hold_out"}:
            raise UserError(f"scaling: unknown key {shorten(min(map(str, unknown)))}; the only valid key is hold_out")
        if self.method != "grid":
            raise UserError(f"scaling: method is {self.method}; the sizes and training lengths must form a grid")
        if self.direction != "minimize":
            raise UserError(f"scaling: direction is {self.direction}; the law describes a loss, which is minimized")
        lengths = self.length_dimensions
        if lengths & {"trainer.max_time", BUDGET_PREFIX + "minutes"}:
            raise UserError("scaling: the number of tokens of a run in minutes is unknown; vary budget.tokens")
        for what, names in (("training lengths (budget.tokens)", lengths), ("sizes", self.vary.keys() - lengths)):
            found = math.prod(len(self.vary[name].grid()) for name in names)
            if found < MIN_SETTINGS:
                raise UserError(
                    f"scaling: vary has {found if names else 'no'} different {what}, but the coefficients of the law "
                    f"require at least {MIN_SETTINGS}"
                )
        held_out = self.held_out
        if held_out is None:
            return
        for name in self.vary:
            if name not in held_out:
                raise UserError(f"scaling: hold_out has no {name}; it must name a setting of each dimension under vary")
            if not self.vary[name].contains(held_out[name]):
                raise UserError(
                    f"scaling: hold_out: {name} is {shorten(held_out[name])}; it must be one of the settings under vary"
                )
        if unknown := held_out.keys() - self.vary.keys():
            raise UserError(f"scaling: hold_out: {shorten(min(map(str, unknown)))} is not listed under vary")
        if held_out == self.baseline_assignment:
            raise UserError("scaling: hold_out is the baseline, which is the first trial; list the smallest size first")

    @property
    def length_dimensions(self) -> set[str]:
        """Names of the dimensions that set a training budget or its flag."""
        flags = {*BUDGET_FLAGS.values(), *(BUDGET_PREFIX + unit for unit in BUDGET_FLAGS)}
        return {
            name
            for name, dimension in self.vary.items()
            if any(flags & dimension.to_flags(setting).keys() for setting in dimension.example_settings())
        }

    @cached_property
    def held_out(self) -> Assignment | None:
        """Assignment of the trial that is executed after its loss has been predicted, or None if there is none."""
        return dict(self.scaling["hold_out"]) if self.scaling and self.scaling.get("hold_out") else None

    @property
    def baseline_assignment(self) -> Assignment:
        """Settings of the baseline in all search dimensions."""
        return {name: dimension.baseline for name, dimension in self.vary.items()} | self.baseline

    @cached_property
    def predefined_assignments(self) -> list[Assignment]:
        """Assignments known before the search, starting with the baseline; for grid search, all combinations."""
        baseline = self.baseline_assignment
        if self.method != "grid":
            return [baseline]
        others = [each for each in grid_product(self.vary) if each not in (baseline, self.held_out)]
        return [baseline, *others, *([] if self.held_out is None else [self.held_out])]

    @property
    def n_trials(self) -> int:
        """Number of trials, including the baseline."""
        return self.trials or len(self.predefined_assignments)

    def fit_flags(self, assignment: Assignment) -> FitFlags:
        """Return the flags that are passed to ``fit`` in all runs of a trial, in addition to the config files.

        If two dimensions set the same flag, the later dimension takes precedence. Flags whose value is null are
        omitted, because ``fit`` cannot parse null for a flag that selects a class; they keep their value from the
        config files, or their default.
        """
        flags = dict(self.fixed)
        for name, setting in assignment.items():
            chosen = self.vary[name].to_flags(setting)
            flags |= {flag: value for flag, value in chosen.items() if _budget_unit(flag) is None}
        return {name: value for name, value in flags.items() if value is not None}

    def budget_of(self, assignment: Assignment) -> dict[str, float]:
        """Return the training budget of each run of a trial, keyed by its unit."""
        budget = dict(self.budget)
        for name, setting in assignment.items():
            for flag, amount in self.vary[name].to_flags(setting).items():
                if (unit := _budget_unit(flag)) is not None:
                    budget |= _parse_budget({unit: amount})
        return budget

    def build_pruner(self) -> optuna.pruners.BasePruner:
        """Build the Optuna pruner specified by ``pruning``.

        Raises:
            UserError: The pruner does not exist or does not accept the arguments.
        """
        if not self.pruning:
            return optuna.pruners.NopPruner()
        [(name, arguments)] = self.pruning.items()
        if arguments is not None and not isinstance(arguments, Mapping):
            raise UserError(f"pruning: {name} is {shorten(arguments)}; it must be a mapping of arguments to values")
        pruners = [each for each in optuna.pruners.__all__ if each.endswith("Pruner") and each != "BasePruner"]
        _require_one_of("pruning", name, pruners)
        try:
            return getattr(optuna.pruners, name)(**(arguments or {}))  # type: ignore[no-any-return]  # looked up by name
        except Exception as error:  # pruners do not check the types of their arguments
            parameters = ", ".join(inspect.signature(getattr(optuna.pruners, name)).parameters)
            raise UserError(f"pruning: {name}: {shorten(error)}; valid arguments are {parameters}") from error

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that defines the study, except ``trials``, so that trials can be added to a study."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("question", "trials", "vary")}
        if self.scaling is None:  # studies that were created before this key existed
            del content["scaling"]
        content["base"] = [_read_config_file(path) for path in self.base]
        content["vary"] = {name: asdict(each) for name, each in self.vary.items()}  # type: ignore[call-overload]  # dataclasses
        return short_hash(content)


def load_sweep(path: Path) -> SweepConfig:
    """Read and validate a sweep file.

    Raises:
        UserError: The file cannot be read, is not valid YAML, or contains an invalid value.
    """
    given, text = load_yaml(path)
    try:
        return _parse_sweep(path.stem, _leading_comment(text), given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def suggest_closest(name: str, names: Any) -> str:
    """Return an error-message suffix with the most similar known name, or an empty string if no name is similar."""
    close = get_close_matches(name[:100], list(names), 1, 0.5)
    return f"; the closest match is {close[0]}" if close else ""


def short_hash(content: Any) -> str:
    """Return the first eight hexadecimal digits of the SHA-256 hash of JSON-serializable data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _parse_sweep(name: str, question: str, given: Any) -> SweepConfig:
    if not isinstance(given, dict) or "vary" not in given:
        raise UserError("a sweep file must be a mapping with at least the key vary")
    known = [f.name for f in fields(SweepConfig) if f.name not in ("name", "question")]
    for key in given:
        if key not in known:
            raise UserError(
                f"unknown key {shorten(key)}{suggest_closest(str(key), known)}; valid keys are {', '.join(known)}"
            )
    types: dict[str, tuple[type, ...]] = {
        "base": (list, str), "fixed": (dict,), "vary": (dict,), "seeds": (list,), "budget": (dict,), "trials": (int,),
        "baseline": (dict,), "metric": (str,), "pruning": (str, dict), "scaling": (dict,),
    }  # fmt: skip
    for key, accepted in types.items():
        if given.get(key) is not None and not isinstance(given[key], accepted):
            type_names = {list: "a list", dict: "a mapping", str: "a string", int: "an integer"}
            raise UserError(
                f"{key} is {shorten(given[key])}; it must be {' or '.join(type_names[each] for each in accepted)}"
            )
    values = {key: value for key, value in given.items() if value is not None}
    if "base" in values:
        base = [values["base"]] if isinstance(values["base"], str) else values["base"]
        if not all(isinstance(path, str) and path for path in base):
            raise UserError(f"base is {shorten(base)}; it must be a path, or a list of paths")
        values["base"] = tuple(map(Path, base))
    if "seeds" in values:
        if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in values["seeds"]):
            raise UserError(f"seeds are {shorten(values['seeds'])}; they must be integers")
        values["seeds"] = tuple(values["seeds"])
    if isinstance(values.get("pruning"), str):
        values["pruning"] = {values["pruning"]: {}}
    if len(values.get("pruning", [0])) != 1:
        raise UserError("pruning must contain exactly one Optuna pruner, optionally with arguments")
    values["budget"] = _parse_budget(values.get("budget", {}))
    values["vary"] = {name: parse_dimension(name, each) for name, each in (given["vary"] or {}).items()}
    values["baseline"] = _parse_assignment("baseline", values.get("baseline", {}), values["vary"])
    if "scaling" in values and values["scaling"].get("hold_out") is not None:
        held_out = values["scaling"]["hold_out"]
        if not isinstance(held_out, dict):
            raise UserError(f"scaling: hold_out is {shorten(held_out)}; it must be a mapping of dimensions to settings")
        settings = _parse_assignment("scaling: hold_out", held_out, values["vary"])
        values["scaling"] = {**values["scaling"], "hold_out": settings}
    return SweepConfig(name=name, question=question, **values)


def _parse_assignment(key: str, given: Mapping[str, Any], vary: Mapping[str, SearchDimension]) -> Assignment:
    return {
        name: parse_number(f"{key}: {name}", value) if isinstance(vary.get(name), NumericRange) else format_label(value)
        for name, value in given.items()
    }


def _budget_unit(flag: Any) -> str | None:
    """Return the unit of a budget that is listed like a flag, or None for other flags; keys in YAML may be numbers."""
    return str(flag).removeprefix(BUDGET_PREFIX) if str(flag).startswith(BUDGET_PREFIX) else None


def _parse_budget(given: Mapping[str, Any]) -> dict[str, float]:
    for unit in given:
        _require_one_of("budget", str(unit), tuple(BUDGET_FLAGS))
    budget = {unit: parse_number(f"budget: {unit}", amount) for unit, amount in given.items()}
    for unit, amount in budget.items():
        if amount <= 0:
            raise UserError(f"budget: {unit} is {amount}; it must be positive")
    _require_one_limit(budget)
    return budget


def _require_one_limit(units: Collection[str]) -> None:
    if {"steps", "tokens"} <= set(units):
        raise UserError("budget: steps and tokens both set trainer.max_steps; remove one of them")


def _read_config_file(path: Path) -> str:
    try:
        if not path.is_file():
            raise UserError(f"base: config file {path} not found (relative paths are resolved against {Path.cwd()})")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"base: cannot read {shorten(path)}: {reason}") from error


def _require_one_of(key: str, value: Any, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"{key} is {shorten(value)}; it must be one of {', '.join(allowed)}")


def _leading_comment(text: str) -> str:
    """Return the comment lines at the top of a file, joined by spaces."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return " ".join(lines)
