"""The file that says what a sweep is."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import optuna
import yaml

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.search_space import (
    Flags,
    NumericRange,
    SearchDimension,
    Setting,
    dimension,
    format_label,
    number,
    product,
)

METHODS: Final = ("grid", "random", "tpe")
DIRECTIONS: Final = ("minimize", "maximize")
OWN: Final = ("runs", "experiment", "ckpt_path", "seed_everything", "force", "plan")
"""Flags of ``fit`` that the sweep itself gives."""
BUDGET: Final = {"steps": "trainer.max_steps", "tokens": "trainer.max_steps", "minutes": "trainer.max_time"}
"""What a run may cost, and the flag that ends it there."""

Assignment = dict[str, Setting]


@dataclass(frozen=True)
class Sweep:
    """What is varied over what, how it is searched, and by what it is judged.

    Args:
        name: The file's, without its suffix.
        question: The comment at the top of the file.
        vary: Dimensions by name.
        base: Configs of ``fit`` that every run begins with.
        fixed: Flags of ``fit`` that all runs share, over the configs.
        method: ``grid`` tries every combination, ``random`` draws, ``tpe`` learns from what was tried
            (the tree-structured Parzen estimator, https://papers.nips.cc/paper/4443, as Optuna has it).
        trials: How many assignments ``random`` and ``tpe`` try; the first is the baseline.
        seeds: Each trial is a run with each of them.
        metric: Of ``summary.json``; a trial's value is its mean over the seeds.
        direction: ``minimize`` or ``maximize``.
        budget: What a run may cost: ``steps``, ``tokens`` or ``minutes`` of training.
        pruning: A pruner of Optuna by its class's name, or that name with arguments. It sees the metric of the first
            seed's run at each validation, by optimizer steps; a trial that it stops has no other runs.
        baseline: Settings that the others are compared with, where it is not the first of a list or the middle of a
            range; the first trial has them.

    Raises:
        UserError: Something cannot be.
    """

    name: str
    question: str
    vary: Mapping[str, SearchDimension]
    base: tuple[Path, ...] = ()
    fixed: Flags = field(default_factory=dict)
    method: str = "grid"
    trials: int | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    metric: str = "val/bits_per_byte"
    direction: str = "minimize"
    budget: Mapping[str, float] = field(default_factory=dict)
    pruning: Mapping[str, Any] | None = None
    baseline: Assignment = field(default_factory=dict)

    def __post_init__(self) -> None:
        _refuse_other("method", self.method, METHODS)
        _refuse_other("direction", self.direction, DIRECTIONS)
        if not self.vary:
            raise UserError("vary has no dimension in it: the grid is empty")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"seeds are {list(self.seeds)}; give at least one, each once, 0 or more")
        if self.method == "grid" and self.trials is not None:
            raise UserError("trials: a grid has as many as there are combinations; leave it out, or choose a method")
        if self.method != "grid" and (self.trials is None or self.trials < 1):
            raise UserError(f"trials is {self.trials}; say how many {self.method} is to try")
        for path in self.base:
            if not path.is_file():
                raise UserError(f"base: no such file: {path} (looked in {Path.cwd()})")
        self._check_flags()
        self._check_baseline()
        self.pruner()
        _ = self.assignments

    def _check_flags(self) -> None:
        varied = [flags for each in self.vary.values() for s in each.samples() for flags in each.flags(s)]
        for name in (*self.fixed, *varied):
            if name in OWN:
                how = "say it under seeds" if name == "seed_everything" else "leave it out"
                raise UserError(f"{name} is the sweep's own to set; {how}")
            if name in self.fixed and name in varied:
                raise UserError(f"{name} is under fixed and under vary; leave it in one of them")
        for what, flag in BUDGET.items():
            if what in self.budget and {flag} & {*self.fixed, *varied}:
                raise UserError(f"budget: {what} sets {flag}, which is given too; leave one of them out")

    def _check_baseline(self) -> None:
        for name, setting in self.baseline.items():
            if name not in self.vary:
                raise UserError(f"baseline: {name} is not under vary{nearest(name, self.vary)}")
            if not self.vary[name].holds(setting):
                raise UserError(f"baseline: {name} is {setting}, which is not under vary")

    @property
    def first(self) -> Assignment:
        """The baseline."""
        return {name: each.baseline for name, each in self.vary.items()} | self.baseline

    @cached_property
    def assignments(self) -> list[Assignment]:
        """All that are known ahead: the grid, or the baseline; the baseline first."""
        if self.method != "grid":
            return [self.first]
        grid = product(self.vary)
        return [self.first, *(assignment for assignment in grid if assignment != self.first)]

    @property
    def n_trials(self) -> int:
        """How many there are to be."""
        return self.trials or len(self.assignments)

    def flags(self, assignment: Assignment) -> Flags:
        """Flags of all runs of a trial, beside the configs; those of a later dimension go over those before.

        A value of null leaves a flag as the configs and defaults have it: the parser reads no null into a class.
        """
        flags = dict(self.fixed)
        for name, setting in assignment.items():
            flags |= self.vary[name].flags(setting)
        return {name: value for name, value in flags.items() if value is not None}

    def pruner(self) -> optuna.pruners.BasePruner:
        """The pruner that the file asks for.

        Raises:
            UserError: Optuna has none of this name, or it takes no such argument.
        """
        if not self.pruning:
            return optuna.pruners.NopPruner()
        [(name, arguments)] = self.pruning.items()
        names = [each for each in optuna.pruners.__all__ if each.endswith("Pruner") and each != "BasePruner"]
        _refuse_other("pruning", name, names)
        try:
            return getattr(optuna.pruners, name)(**(arguments or {}))  # type: ignore[no-any-return]  # looked up by name
        except (TypeError, ValueError) as error:
            takes = ", ".join(inspect.signature(getattr(optuna.pruners, name)).parameters)
            raise UserError(f"pruning: {name}: {error} (it takes {takes})") from error

    @cached_property
    def fingerprint(self) -> str:
        """Of all that makes two sweeps different: with more ``trials`` it is the same one."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("question", "trials", "vary")}
        content["base"] = [path.read_text(encoding="utf-8") for path in self.base]
        content["vary"] = {name: asdict(each) for name, each in self.vary.items()}  # type: ignore[call-overload]  # all are
        return digest(content)


def load(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: It is missing, is no YAML, or says what cannot be.
    """
    try:
        text = path.read_text(encoding="utf-8")
        given = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no text'}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {error}") from error
    try:
        return _sweep(path.stem, _comment(text), given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def nearest(name: str, names: Any) -> str:
    """The end of a message about a name that is unknown."""
    close = get_close_matches(name, list(names), 1, 0.5)
    return f"; the nearest is {close[0]}" if close else ""


def digest(content: Any) -> str:
    """Eight hexadecimal digits that differ where plain data differ."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _sweep(name: str, question: str, given: Any) -> Sweep:
    if not isinstance(given, dict) or "vary" not in given:
        raise UserError("a sweep is a mapping that has at least: vary")
    known = [f.name for f in fields(Sweep) if f.name not in ("name", "question")]
    for key in given:
        if key not in known:
            raise UserError(f"there is no {key} in a sweep{nearest(str(key), known)}; there are {', '.join(known)}")
    kinds: dict[str, tuple[type, ...]] = {
        "base": (list, str), "fixed": (dict,), "vary": (dict,), "seeds": (list,), "budget": (dict,), "trials": (int,),
        "baseline": (dict,), "metric": (str,), "pruning": (str, dict),
    }  # fmt: skip
    for key, kind in kinds.items():
        if given.get(key) is not None and not isinstance(given[key], kind):
            words = {list: "a list", dict: "a mapping", str: "a text", int: "a whole number"}
            raise UserError(f"{key} is {given[key]}; it must be {' or '.join(words[each] for each in kind)}")
    read = {key: value for key, value in given.items() if value is not None}
    if "base" in read:
        read["base"] = tuple(Path(p) for p in ([read["base"]] if isinstance(read["base"], str) else read["base"]))
    if "seeds" in read:
        if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in read["seeds"]):
            raise UserError(f"seeds are {read['seeds']}; they must be whole numbers")
        read["seeds"] = tuple(read["seeds"])
    if isinstance(read.get("pruning"), str):
        read["pruning"] = {read["pruning"]: {}}
    if len(read.get("pruning", [0])) != 1:
        raise UserError("pruning names one pruner of Optuna, with its arguments")
    read["budget"] = _budget(read.get("budget", {}))
    read["vary"] = {name: dimension(name, each) for name, each in (given["vary"] or {}).items()}
    read["baseline"] = {
        name: number(f"baseline: {name}", value)
        if isinstance(read["vary"].get(name), NumericRange)
        else format_label(value)
        for name, value in read.get("baseline", {}).items()
    }
    return Sweep(name=name, question=question, **read)


def _budget(given: Mapping[str, Any]) -> dict[str, float]:
    for what in given:
        _refuse_other("budget", str(what), tuple(BUDGET))
    budget = {what: number(f"budget: {what}", amount) for what, amount in given.items()}
    for what, amount in budget.items():
        if amount <= 0:
            raise UserError(f"budget: {what} is {amount}; it must be positive")
    if {"steps", "tokens"} <= budget.keys():
        raise UserError("budget: steps and tokens both end a run; give one of them")
    return budget


def _refuse_other(what: str, given: str, there: Any) -> None:
    if given not in there:
        raise UserError(f"{what} is {given}; it must be one of {', '.join(there)}")


def _comment(text: str) -> str:
    """What the file says before its first line that is no comment."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return " ".join(lines)
