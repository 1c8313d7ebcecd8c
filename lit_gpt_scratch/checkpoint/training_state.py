"""Type definitions for the training state in a checkpoint, and functions that validate it when a run is resumed."""

from collections.abc import Iterator
from typing import Any, Final, TypeVar

from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import NotRequired, TypedDict

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import describe, validate

T = TypeVar("T")


class ReadyCounts(TypedDict):
    """Counts of optimizer or scheduler steps."""

    ready: int
    completed: int


class ProcessedCounts(TypedDict):
    """Counts of batches or epochs."""

    ready: int
    started: int
    processed: int
    completed: int


class StepProgress(TypedDict):
    """Step counts of the current epoch and of the whole run."""

    current: ReadyCounts
    total: ReadyCounts


class LoopProgress(TypedDict):
    """Batch or epoch counts of the current loop and of the whole run."""

    current: ProcessedCounts
    total: ProcessedCounts


class BatchLoopProgress(LoopProgress):
    """Progress of a loop over batches."""

    is_last_batch: bool


class OptimizerProgress(TypedDict):
    """Progress of Lightning's automatic optimization."""

    optimizer: dict[str, StepProgress]


class SavedOptimizer(TypedDict):
    """State dict of an optimizer."""

    state: dict[Any, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class SavedSchedule(TypedDict):
    """State dict of a ``LambdaLR``."""

    base_lrs: list[float]
    last_epoch: int
    _step_count: int
    _last_lr: list[float]
    lr_lambdas: list[Any]


class SavedLayout(TypedDict):
    """``BatchLayout`` as stored in a checkpoint."""

    batch_size: int
    replicas: int
    accumulate: int


FitLoopState = TypedDict(
    "FitLoopState",
    {
        "epoch_progress": LoopProgress,
        "epoch_loop.state_dict": dict[str, Any],
        "epoch_loop.batch_progress": BatchLoopProgress,
        "epoch_loop.scheduler_progress": StepProgress,
        "epoch_loop.automatic_optimization.optim_progress": OptimizerProgress,
        "epoch_loop.val_loop.batch_progress": BatchLoopProgress,
    },
)


class LoopStates(TypedDict):
    """Progress of a Trainer's loops."""

    fit_loop: FitLoopState


class TrainingState(TypedDict):
    """Training state that a Trainer checkpoint contains in addition to the weights."""

    epoch: int
    global_step: int
    loops: LoopStates
    callbacks: dict[str, Any]
    optimizer_states: list[SavedOptimizer]
    lr_schedulers: list[SavedSchedule]
    layout: NotRequired[SavedLayout]


DAMAGED: Final = "resume from another checkpoint"


def validate_training_state(checkpoint: dict[str, Any]) -> None:
    """Check the types of the training state in a Trainer's checkpoint.

    The states of callbacks are not checked; each callback calls ``validate_callback_state``.

    Raises:
        UserError: An entry is missing or has the wrong type, or a count is negative.
    """
    try:
        state = validate(checkpoint, TrainingState, "checkpoint")
        if any(count < 0 for count in (state["epoch"], state["global_step"], *_find_counts(state["loops"]))):
            raise ValueError("it contains a negative count")
        layout: dict[str, Any] = {**state.get("layout", {})}
        if layout and (layout.keys() != SavedLayout.__annotations__.keys() or min(layout.values()) < 1):
            raise ValueError("checkpoint.layout must have all fields, each with a positive value")
        for schedule in state["lr_schedulers"]:
            if replaced := [name for name in schedule if callable(getattr(LambdaLR, name, None))]:
                raise ValueError(f"checkpoint.lr_schedulers would overwrite the method {replaced[0]}")
    except ValueError as error:
        raise UserError(f"the training state is corrupted ({error}); {DAMAGED}") from error


def validate_callback_state(state: Any, hint: type[T], name: str) -> T:
    """Return the state of a callback after checking its type; see ``schema.validate``.

    Raises:
        UserError: The state has the wrong type.
    """
    try:
        return validate(state, hint, f"callbacks.{name}")
    except ValueError as error:
        raise UserError(f"the training state is corrupted ({error}); {DAMAGED}") from error


def validate_like(saved: Any, fresh: Any, name: str) -> None:
    """Check that a saved state has the keys of a newly initialized state, and numeric values for its numeric keys.

    Args:
        saved: State from the checkpoint.
        fresh: State of the new object that will load ``saved``.
        name: Name of the state, used in error messages.

    Raises:
        UserError: A key is missing, or a value is not a number.
    """
    if isinstance(fresh, dict):
        if not isinstance(saved, dict) or not fresh.keys() <= saved.keys():
            raise UserError(f"the training state is corrupted ({name} has missing keys); {DAMAGED}")
        for key in fresh:
            validate_like(saved[key], fresh[key], f"{name}.{key}")
    elif isinstance(fresh, bool | int | float) and not isinstance(saved, bool | int | float):
        raise UserError(f"the training state is corrupted ({name} is {describe(saved)}); {DAMAGED}")


def _find_counts(loops: Any) -> Iterator[int]:
    """Yield all integers in nested dictionaries.

    Raises:
        ValueError: One of Lightning's progress counts is not an integer.
    """
    for name, value in loops.items():
        if isinstance(value, dict):
            yield from _find_counts(value)
        elif isinstance(value, int):
            yield value
        elif name in ("ready", "started", "processed", "completed"):
            raise ValueError(f"a count of {name} batches or steps is {describe(value)}; it must be an integer")
