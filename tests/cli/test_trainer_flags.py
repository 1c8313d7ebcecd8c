"""Checks of the Trainer's flags, and the flags that an error names."""

from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, BasePredictionWriter, LearningRateFinder, ModelPruning, Timer

from lit_gpt_scratch.cli.config_files import FitParser
from lit_gpt_scratch.cli.error_formatting import user_errors
from lit_gpt_scratch.cli.trainer_flags import (
    explain_trainer_error,
    name_flags,
    validate_callbacks,
    validate_trainer_flags,
)
from lit_gpt_scratch.errors import UserError


@pytest.fixture(scope="module")
def defaults() -> dict[str, Any]:
    """Flags of a run, with Lightning's defaults resolved as ``fit`` does."""
    parser = FitParser(exit_on_error=False)
    parser.add_class_arguments(Trainer, "trainer")
    flags = dict(vars(parser.get_defaults().trainer))
    return flags | {"max_steps": 900, "val_check_interval": 300, "gradient_clip_algorithm": "norm"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        *((f"limit_{stage}_batches", value, "a whole number of batches, or a fraction")
          for stage in ("train", "val", "test", "predict") for value in (1.5, -1, -0.5, float("nan"), float("inf"))),
        ("overfit_batches", 2.5, "a whole number of batches, or a fraction"),
        ("val_check_interval", 1.5, "a whole number of batches, or a fraction"),
        ("val_check_interval", 0, "it must be positive"),
        ("val_check_interval", 0.0, "--trainer.limit_val_batches 0"),
        ("val_check_interval", "soon", "DD:HH:MM:SS"),
        ("max_time", "1:00", "DD:HH:MM:SS"),
        ("max_time", {"parsecs": 1}, "weeks, days, hours, minutes and seconds"),
        ("max_time", {"seconds": 0}, "it must be positive"),
        ("max_time", "00:00:00:00", "it must be positive"),
        ("max_time", "9999999999:00:00:00", "it must be at most 999999999 days"),
        ("max_time", {"days": float("nan")}, "it must be at most 999999999 days"),
        ("max_time", {"days": "x"}, "weeks, days, hours"),
        ("val_check_interval", "9999999999:00:00:00", "it must be at most 999999999 days"),
        ("num_nodes", 10**9, "it must be at most 65536"),
        ("limit_train_batches", 0, "no training steps"),
        ("max_steps", 0, "no training steps"),
        ("max_epochs", 0, "no training steps"),
        ("max_epochs", -2, "-1 or more (-1: no limit)"),
        ("check_val_every_n_epoch", 0, "it must be positive"),
        ("num_nodes", 0, "it must be positive"),
        ("accumulate_grad_batches", 0, "it must be positive"),
        ("gradient_clip_val", float("nan"), "0 or more"),
        ("gradient_clip_algorithm", "median", "norm or value"),
    ],
)  # fmt: skip
def test_invalid_values_name_the_flag(defaults: dict[str, Any], name: str, value: Any, words: str) -> None:
    validate_trainer_flags(defaults)
    with pytest.raises(UserError) as error:
        validate_trainer_flags(defaults | {name: value})
    assert str(error.value).startswith(f"--trainer.{name} is {value}")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("limit_train_batches", "val_check_interval") for value in (1, 1.0, 0.25, 700)),
        ("limit_val_batches", 0), ("overfit_batches", 0.0), ("max_steps", -1), ("max_epochs", None),
        ("val_check_interval", "00:00:10:00"), ("val_check_interval", {"minutes": 5}), ("max_time", {"hours": 1}),
        ("fast_dev_run", True), ("num_sanity_val_steps", -1), ("gradient_clip_val", 1e30),
        *((name, 10**9) for name in (
            "max_epochs", "max_steps", "log_every_n_steps", "val_check_interval", "accumulate_grad_batches",
            "limit_train_batches", "limit_val_batches",
        )),
    ],
)  # fmt: skip
def test_valid_values_are_accepted(defaults: dict[str, Any], name: str, value: Any) -> None:
    validate_trainer_flags(defaults | {name: value})


@pytest.mark.parametrize(
    ("flags", "text", "named"),
    [
        ({"devices": 3}, "you set `devices=3`, but --ntasks-per-node=2", "--trainer.devices 3"),
        ({}, "you set `devices`, but --ntasks-per-node=2", "--trainer.devices auto"),
        ({"profiler": "x", "precision": "32"}, "the profiler is unknown", "--trainer.profiler x"),
        ({"accelerator": "cpu"}, "something else", "--trainer.accelerator cpu"),
        ({"devices": [0]}, "`devices` should be an int", "--trainer.devices [0]"),
        ({"plugins": Timer("00:00:00:01")}, "plugins", "--trainer.plugins Timer"),
    ],
)
def test_errors_name_the_flags_that_cause_them(
    defaults: dict[str, Any], flags: dict[str, Any], text: str, named: str
) -> None:
    error = explain_trainer_error(ValueError(text), defaults | flags, defaults)
    assert str(error) == f"{named}: {text}"


def test_a_class_is_named_by_its_flag(defaults: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="not a valid duration") as raised:
        Timer("soon")
    error = explain_trainer_error(raised.value, defaults, defaults)
    assert str(error).startswith("--trainer.callbacks ")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("`max_epochs=-1`", "--trainer.max_epochs -1"),
        ("`Trainer(limit_val_batches=1)` was", "--trainer.limit_val_batches 1 was"),
        ("set `limit_val_batches` to 0", "set --trainer.limit_val_batches to 0"),
        ("`max_epochs_of_mine`, max_epochs", "`max_epochs_of_mine`, max_epochs"),
    ],
)
def test_arguments_are_named_as_flags(message: str, expected: str) -> None:
    assert name_flags(message) == expected


def test_callbacks_that_cannot_work_are_refused() -> None:
    class Writer(BasePredictionWriter):
        """A user's subclass of a base class."""

    validate_callbacks([Callback(), Writer(), Timer()])
    refused: list[Callback] = [
        BaseFinetuning(), BasePredictionWriter(), LearningRateFinder(), ModelPruning("l1_unstructured"),
    ]  # fmt: skip
    for callback in refused:
        with pytest.raises(UserError, match=f"--trainer.callbacks {type(callback).__name__} "):
            validate_callbacks([callback])


def test_duration_of_a_callback_is_too_long() -> None:
    with pytest.raises(UserError, match="callbacks Timer"), user_errors():
        Timer(duration="9999999999:00:00:00")
