"""Check the Trainer's flags before anything is built, and find the flags that caused a Trainer error."""

import math
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
)

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import MAX_INT, describe

MINIMUM: Final = {
    "num_nodes": 1, "max_epochs": -1, "min_epochs": 0, "max_steps": -1, "min_steps": 0, "check_val_every_n_epoch": 1,
    "num_sanity_val_steps": -1, "log_every_n_steps": 0, "accumulate_grad_batches": 1, "gradient_clip_val": 0,
    "reload_dataloaders_every_n_epochs": 0, "fast_dev_run": 0,
}  # fmt: skip
"""Lowest valid value of each numeric flag."""
MAXIMUM: Final = {"num_nodes": 2**16}
"""Highest valid value of integer flags whose maximum is not ``MAX_INT``."""
MINUS_ONE: Final = {"max_epochs": "no limit", "max_steps": "no limit", "num_sanity_val_steps": "all batches"}
"""Meaning of the value -1 for flags that accept it, keyed by flag."""
BATCHES: Final = (
    "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches",
    "val_check_interval",
)  # fmt: skip
"""Flags whose value is a whole number of batches, or a fraction of an epoch's batches."""
DURATION: Final = re.compile(r"\d+:\d\d:\d\d:\d\d")
"""Pattern that matches a duration (``DD:HH:MM:SS``) in ``max_time`` or ``val_check_interval``."""
UNSUPPORTED_CALLBACKS: Final[dict[type[Callback], str]] = {
    BackboneFinetuning: "requires a model with a separate backbone; use --model.train_layers",
    BaseFinetuning: "is a base class; use --model.train_layers, or the import path of your own subclass",
    BasePredictionWriter: "writes predictions, but fit makes none; use the commands generate or evaluate",
    BatchSizeFinder: "would change the batch size during the run, and with it the order of the data; set "
    "--data.batch_size, and use --plan to measure the speed",
    LearningRateFinder: "would train on data that the run then skips; compare learning rates with the command sweep",
    ModelPruning: "looks for parameters before fit has built the model; prune the trained model",
}
"""Reason and alternative for each Lightning callback that does not work in ``fit``."""
COMPONENTS: Final = {
    "callbacks": "callbacks", "loggers": "logger", "profilers": "profiler", "accelerators": "accelerator",
    "strategies": "strategy", "precision": "precision", "plugins": "plugins",
}  # fmt: skip
"""Flags that select a Lightning class, keyed by the subpackage that contains the class."""
HARDWARE: Final = ("accelerator", "devices", "strategy", "precision")
"""Flags that are listed in the error message if Lightning's message mentions no flag."""


def validate_trainer_flags(trainer: Mapping[str, Any]) -> None:
    """Check the values of the Trainer's flags, one at a time.

    Lightning would accept some invalid values, and reject others later with messages that do not name the flags.

    Args:
        trainer: The Trainer's flags, with defaults resolved.

    Raises:
        UserError: A value is out of range, or no training steps would run.
    """
    for name, minimum in MINIMUM.items():
        value = trainer[name]
        if not isinstance(value, int | float):
            continue
        if not minimum <= value < math.inf:
            meaning = f" (-1: {MINUS_ONE[name]})" if name in MINUS_ONE else ""
            least = "positive" if minimum == 1 else f"{minimum} or more{meaning}"
            raise UserError(f"--trainer.{name} is {value}; it must be {'finite' if value == math.inf else least}")
        if isinstance(value, int) and value > (maximum := MAXIMUM.get(name, MAX_INT)):
            raise UserError(f"--trainer.{name} is {describe(value)}; it must be at most {maximum}")
    for name in BATCHES:
        value = trainer[name]
        if isinstance(value, int | float) and not isinstance(value, bool):
            is_fraction = isinstance(value, float) and not value.is_integer()
            if not 0 <= value < math.inf or (is_fraction and value > 1):
                raise UserError(
                    f"--trainer.{name} is {value}; it must be a whole number of batches, or a fraction of an epoch, "
                    "from 0.0 to 1.0"
                )
    if trainer["val_check_interval"] == 0:
        raise UserError(
            f"--trainer.val_check_interval is {trainer['val_check_interval']}; it must be positive; to disable "
            "validation, use --trainer.limit_val_batches 0"
        )
    for name in ("max_time", "val_check_interval"):
        _validate_duration(name, trainer[name])
    if (algorithm := trainer["gradient_clip_algorithm"]) not in ("norm", "value"):
        raise UserError(f"--trainer.gradient_clip_algorithm is {algorithm}; it must be norm or value")
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if trainer[name] == 0 and not trainer["fast_dev_run"]:
            raise UserError(f"--trainer.{name} is {trainer[name]}, so no training steps would run; increase it")


def _validate_duration(name: str, value: Any) -> None:
    problem = f"--trainer.{name} is {value}"
    if isinstance(value, str):
        if not DURATION.fullmatch(value.strip()):
            raise UserError(f"{problem}; use the format DD:HH:MM:SS, such as 00:12:00:00")
        days, hours, minutes, seconds = map(int, value.split(":"))
        value = {"days": days, "hours": hours, "minutes": minutes, "seconds": seconds}
    if not isinstance(value, dict):
        return
    try:
        duration = timedelta(**value)
    except TypeError:
        units = "weeks, days, hours, minutes and seconds"
        raise UserError(f"{problem}; use numbers with the units {units}") from None
    except (ValueError, OverflowError):  # ValueError: nan
        raise UserError(f"{problem}; it must be at most {timedelta.max.days} days") from None
    if duration <= timedelta():
        raise UserError(f"{problem}; it must be positive")


def validate_callbacks(callbacks: list[Callback]) -> None:
    """Check that ``fit`` supports the callbacks of ``--trainer.callbacks``.

    Raises:
        UserError: A callback cannot work in ``fit``; the message names an alternative.
    """
    for callback in callbacks:
        for kind, reason in UNSUPPORTED_CALLBACKS.items():
            if type(callback) is kind or (isinstance(callback, kind) and not kind.__name__.startswith("Base")):
                raise UserError(f"--trainer.callbacks {type(callback).__name__} {reason}")


def explain_trainer_error(error: Exception, trainer: Mapping[str, Any], defaults: Mapping[str, Any]) -> UserError:
    """Convert an exception raised by ``Trainer(...)`` to an error that names the flags that caused it.

    Args:
        error: The exception.
        trainer: The Trainer's flags.
        defaults: Default values of these flags in ``fit``.
    """
    text = " ".join(str(error).split())
    mentioned = [name for name in trainer if re.search(rf"\b{name}\b", text)]
    changed = [name for name in trainer if trainer[name] != defaults.get(name)]
    flags = [name for name in mentioned if name in changed] or mentioned
    if not flags and (component := find_component(error)) and component[1] != "NoneType":
        flags = [component[0]]
    values = {name: trainer[name] for name in flags or [name for name in HARDWARE if name in changed] or HARDWARE}
    is_plain = str, int, float, list, dict
    shown = (f"--trainer.{n} {v if isinstance(v, is_plain) else type(v).__name__}" for n, v in values.items())
    return UserError(f"{' '.join(shown)}: {text}")


def find_component(error: BaseException) -> tuple[str, str] | None:
    """Return the (flag, class name) pair of the Lightning component that raised an error, or None if there is none."""
    trace, found = error.__traceback__, None
    while trace is not None:
        names = trace.tb_frame.f_globals.get("__name__", "").split(".")
        flag = next((COMPONENTS[name] for name in reversed(names) if name in COMPONENTS), None)
        if names[0] == "lightning" and flag is not None:
            found = flag, type(trace.tb_frame.f_locals.get("self")).__name__
        trace = trace.tb_next
    return found


_ARGUMENTS: Final = "|".join(sorted(Trainer.__init__.__annotations__.keys() - {"return"}, key=len, reverse=True))
_ARGUMENT: Final = re.compile(rf"`+(?:Trainer\()?({_ARGUMENTS})(?:\s*=\s*([^`()]*))?\)?`+")


def name_flags(message: str) -> str:
    """Replace Trainer arguments in a Lightning message, such as ```max_steps=1```, with flags."""

    def flag(match: re.Match[str]) -> str:
        return f"--trainer.{match[1]}" + (f" {match[2]}" if match[2] else "")

    return _ARGUMENT.sub(flag, message)
