"""Callbacks that save checkpoints and stop runs between optimizer steps, and base classes for other callbacks."""

import math
import re
import time
from abc import ABC, abstractmethod
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, Checkpoint, Timer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import NotRequired, TypedDict

from lit_gpt_scratch.callbacks.event_logger import tolerate_write_errors
from lit_gpt_scratch.checkpoint.loop_state import count_finished_epochs
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.checkpoint.training_state import validate_callback_state
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.lightning_compat import (
    can_stop_early,
    collective_timeout,
    is_accumulating,
    is_validating_between_steps,
    set_logging_step,
)


class RunDirCallback(Callback):
    """Base class for callbacks that write to the run directory.

    Attributes:
        folder: The run directory, available on every rank after ``setup``. The ``fit`` command sets it on rank 0; if it
            is not set, the logger's directory is used. It is None without a logger, or in a ``fast_dev_run``, which
            writes no files.
    """

    folder: RunFolder | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Broadcast the run directory from rank 0 to all ranks."""
        self.folder = trainer.strategy.broadcast(self.folder)
        if self.folder is None:
            log_dir = trainer.log_dir
            fast_dev_run: int = trainer.fast_dev_run  # type: ignore[attr-defined]  # the trainer sets it late
            self.folder = RunFolder(Path(log_dir)) if log_dir and not fast_dev_run else None


class BetweenSteps(Callback):
    """Base class for callbacks that run between two optimizer steps, before the first micro-batch of a step.

    Attributes:
        due: Whether to call ``between_steps`` before the next optimizer step.
    """

    due: bool = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Call ``between_steps`` before the first micro-batch of an optimizer step if ``due`` is set."""
        if self.due and batch_idx % trainer.accumulate_grad_batches == 0:
            self.between_steps(trainer, pl_module, batch)

    def between_steps(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Run before the first micro-batch of an optimizer step.

        Args:
            trainer: The trainer of the run.
            pl_module: The LightningModule.
            batch: The next micro-batch.
        """
        raise NotImplementedError


class PeriodicCallback(Callback):
    """Base class for callbacks that take measurements at the first optimizer step and at every n-th step.

    Attributes:
        every_n_steps: Number of optimizer steps between measurements; 0 disables them.
    """

    every_n_steps: int
    _step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step at which training starts."""
        self._step = trainer.global_step

    def on_gradient(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Call ``measure_gradient`` if measurements are due at this step.

        ``GPTModule`` calls this hook when the gradient is complete and has not been clipped yet.
        """
        if self._is_due(trainer.global_step + 1):
            self.measure_gradient(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call ``measure_step`` if this micro-batch completed an optimizer step at which measurements are due."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._is_due(self._step):
                self.measure_step(trainer, pl_module)

    def measure_gradient(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take measurements before gradient clipping and the optimizer step; called only for a ``GPTModule``."""

    def measure_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take measurements after the optimizer step, which Lightning logs as step ``trainer.global_step - 1``."""

    def _is_due(self, step: int) -> bool:
        """Return whether measurements are due at a step: at step 1 and at each multiple of ``every_n_steps``."""
        return self.every_n_steps > 0 and (step == 1 or step % self.every_n_steps == 0)


class HostReducer:
    """All-reduces integers across all ranks on the host (with Gloo), without synchronizing the accelerator.

    An instance must be created on all ranks at the same point, after the process group has been initialized.

    Args:
        timeout: Maximum time to wait for the other ranks.
    """

    def __init__(self, timeout: timedelta) -> None:
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # With NCCL, the host would wait for the device at every step.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if distributed else None

    def max(self, value: int) -> int:
        """Return the maximum of ``value`` across all ranks; must be called on every rank."""
        if self._group is None:
            return value
        values = torch.tensor(int(value))
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return int(values.item())


class ValidateAtEnd(Callback):
    """Callback that runs validation at the end of every run, regardless of ``val_check_interval``.

    The trainer runs validation before it stops if ``should_stop`` is set, but not if it reaches ``max_steps`` between
    two validation runs. This callback therefore sets ``should_stop`` at the last step.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set ``should_stop`` at the last step."""
        if limit_reached(trainer):
            trainer.should_stop = True


def limit_reached(trainer: L.Trainer) -> bool:
    """Return whether this batch completes ``max_steps`` or ``max_epochs``; the result is the same on all ranks."""
    steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    return steps or (last_epoch and trainer.is_last_batch)


def time_is_up(trainer: L.Trainer) -> bool:
    """Return whether ``max_time`` has elapsed on this rank; clocks may differ across ranks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    left = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
    return any(seconds is not None and seconds <= 0 for seconds in left)


class CheckpointingState(TypedDict):
    """State of ``Checkpointing`` in a checkpoint; checkpoints of version 0.1 contain only ``best``."""

    best: dict[str, float]
    validation_due: NotRequired[bool]
    tests: NotRequired[bool]
    stopped: NotRequired[bool]


class Checkpointing(BetweenSteps, RunDirCallback, Checkpoint):
    """Callback that saves ``last.ckpt`` for resuming, and the models with the lowest validation loss.

    ``last.ckpt`` is saved between two optimizer steps, after the preceding step has been logged. It is never saved
    between the micro-batches of a step, because the accumulated gradients would be lost. It is also saved before and
    after each validation run. A run that is resumed from a checkpoint saved before a validation run starts with that
    validation run.

    Args:
        every_n_steps: Number of optimizer steps between saves of ``last.ckpt``, which is also saved before and after
            each validation run and at the end of training.
        every_minutes: Maximum number of minutes between saves of ``last.ckpt``; None disables time-based saving.
        keep_best: Number of checkpoints with the lowest validation loss to keep as ``step=N.ckpt``; 0 keeps none.
        background: Whether to write checkpoints in a background thread, from a copy of the state in host memory, while
            training continues.
        format: ``file`` saves a checkpoint as one file, for which rank 0 gathers all weights. ``sharded`` saves it as a
            folder to which each process writes its own shards, for models that do not fit into the memory of one
            process.

    Raises:
        UserError: If an argument is out of range.
    """

    state_key = "Checkpoints"  # key in checkpoints; unchanged since 0.1

    def __init__(
        self,
        every_n_steps: int = 500,
        every_minutes: float | None = None,
        keep_best: int = 1,
        background: bool = False,
        format: Literal["file", "sharded"] = "file",
    ) -> None:
        if every_n_steps < 1:
            raise UserError(f"checkpoint.every_n_steps is {every_n_steps}; it must be at least 1")
        if every_minutes is not None and not every_minutes > 0:
            raise UserError(f"checkpoint.every_minutes is {every_minutes}; it must be positive")
        if keep_best < 0:
            raise UserError(f"checkpoint.keep_best is {keep_best}; it must be 0 or more")
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep_best = keep_best
        self.background = background
        self.format = format
        self.best: dict[str, float] = {}
        """Validation losses of the best checkpoints, keyed by file name, lowest loss first."""
        self.untested = False
        """Whether the resumed run has finished training and only its test run is still due; set when resuming."""
        self._has_test_data = False
        self._validation_due = False
        self._saved: int | None = None
        self._saved_at = 0.0
        self._stop_requested = False
        self._stopped = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise the step and epoch limits by one if they have been reached but a validation or test run is still due.

        Otherwise, the trainer would return without starting that validation or test run.
        """
        loop = trainer.fit_loop
        self._limits = loop.epoch_loop.max_steps, loop.max_epochs
        if self.untested or checkpoint["callbacks"].get(self.state_key, {}).get("validation_due"):
            if 0 < loop.epoch_loop.max_steps <= checkpoint["global_step"]:
                loop.epoch_loop.max_steps = checkpoint["global_step"] + 1
            epochs = count_finished_epochs(checkpoint["loops"]["fit_loop"])
            if 0 < (loop.max_epochs or 0) <= epochs:
                loop.max_epochs = epochs + 1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear ``should_stop`` if a validation or test run is due, so that it starts even if ``max_time`` has elapsed.

        Lightning runs ``Checkpoint`` callbacks last, so the timer has already set ``should_stop``.
        """
        self._should_stop = trainer.should_stop or self.untested
        if self._validation_due or self.untested:
            trainer.should_stop = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove partial files of a killed run, and start the validation run that the killed run left unfinished."""
        self._reducer = HostReducer(collective_timeout(trainer))
        self._has_test_data = bool(getattr(trainer.datamodule, "test_dataset", None))  # type: ignore[attr-defined]  # set late
        self._saved = trainer.global_step or None  # a resumed run already has this checkpoint
        self._saved_at = time.monotonic()
        if self.folder:
            # A checkpoint copied from another run directory may list files that do not exist in this one. Files outside
            # this directory belong to other runs, and must not be deleted when a better model is saved.
            own = {path.name for path in self.folder.checkpoints.glob("step=*.ckpt")}
            self.best = trainer.strategy.broadcast({name: loss for name, loss in self.best.items() if name in own})
            if trainer.is_global_zero:
                self.folder.remove_unfinished()
        if self._validation_due or self.untested:
            self._run_missed_validation(trainer)
            self.untested = False

    def _run_missed_validation(self, trainer: L.Trainer) -> None:
        """Run the validation that was due after the last saved step, and restore the limits on steps and epochs.

        The limits were raised, because Lightning does not resume a run that has reached them. The step and epoch
        counters are set so that this validation run and a subsequent test run log the same counts as an uninterrupted
        run.
        """
        loop = trainer.fit_loop
        loop.epoch_loop.max_steps, loop.max_epochs = self._limits
        set_logging_step(trainer, trainer.global_step - 1)
        epoch_over = not loop.epoch_loop.batch_progress.current.ready
        loop.epoch_progress.current.completed -= epoch_over
        if self._validation_due:
            trainer.validating = True
            loop.epoch_loop.val_loop.run()
            trainer.training = True
        trainer.should_stop = trainer.should_stop or self._should_stop
        loop.epoch_progress.current.completed += epoch_over
        set_logging_step(trainer, trainer.global_step)
        ends = trainer.should_stop or 0 < loop.epoch_loop.max_steps <= trainer.global_step
        if ends and not epoch_over:
            loop.epoch_progress.increment_processed()
            loop.epoch_progress.increment_completed()
        self._validation_due = False  # even if validation has been disabled

    def between_steps(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Save ``last.ckpt`` if the step or time interval has elapsed."""
        if self._saved == trainer.global_step or not trainer.global_step:
            return
        if trainer.global_step % self.every_n_steps == 0 or self._is_time():
            self.save_last(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Defer ``should_stop`` to the end of the optimizer step; a timer can set it between micro-batches."""
        if not (trainer.should_stop or self._stop_requested):
            return
        if is_accumulating(trainer):
            self._stop_requested, trainer.should_stop = True, False
        elif self._stop_requested:
            trainer.should_stop = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save ``last.ckpt`` before validation, which can take a long time and can fail."""
        if is_validating_between_steps(trainer) and self._saved != trainer.global_step:
            self._validation_due = True
            self.save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save ``last.ckpt``, and the model if it is among the best."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validation_due = False
        loss = trainer.callback_metrics.get("val/loss")
        if self.folder and self.keep_best and loss is not None and math.isfinite(loss):
            self._save_best(trainer, self.folder, loss.item())
        if is_validating_between_steps(trainer):
            self.save_last(trainer)
        else:
            self._stop_requested, trainer.should_stop = self._stop_requested or trainer.should_stop, False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save ``last.ckpt`` at the end of training, unless the last step has already been saved.

        This hook runs before ``GPTModule.on_train_end`` replaces the weights with their moving average.
        """
        if trainer.should_stop or limit_reached(trainer):
            unsaved = self._saved != trainer.global_step or self._stopped != self._stops_early(trainer)
            if self._reducer.max(unsaved):
                self.save_last(trainer)

    def save_last(self, trainer: L.Trainer) -> None:
        """Save ``last.ckpt`` and flush the loggers; must be called on every rank."""
        if self.folder:
            self._require_folder(trainer, self.folder)
            self._saved, self._saved_at = trainer.global_step, time.monotonic()
            self._stopped = self._stops_early(trainer)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                    with tolerate_write_errors("the TensorBoard events"):
                        logger.experiment.flush()  # buffered for minutes; a killed run would lose these events
            trainer.save_checkpoint(self.folder.last)

    @staticmethod
    def _require_folder(trainer: L.Trainer, folder: RunFolder) -> None:
        """Check that the run folder still exists; saving would create it again, without its other files."""
        if trainer.is_global_zero and not folder.path.is_dir():
            raise UserError(
                f"{folder.path} was deleted or moved during the run, so step {trainer.global_step} cannot be saved; "
                "restore the folder and resume the run, or start a new run"
            )

    def _stops_early(self, trainer: L.Trainer) -> bool:
        """Return whether a callback stopped the run before it reached a limit on steps, epochs or time.

        Only the result on rank 0 is saved.
        """
        requested = trainer.should_stop and can_stop_early(trainer)  # not before min_steps and min_epochs
        return requested and not limit_reached(trainer) and not time_is_up(trainer)

    def _is_time(self) -> bool:
        if self.every_minutes is None:
            return False
        return bool(self._reducer.max(time.monotonic() - self._saved_at >= 60 * self.every_minutes))

    def _save_best(self, trainer: L.Trainer, folder: RunFolder, loss: float) -> None:
        name = f"step={trainer.global_step}.ckpt"
        ranked = dict(sorted({**self.best, name: loss}.items(), key=lambda item: item[1]))
        kept = dict(list(ranked.items())[: self.keep_best])
        dropped = self.best.keys() - kept.keys()
        self.best = kept
        if name in kept:
            self._require_folder(trainer, folder)
            trainer.save_checkpoint(folder.checkpoints / name)
        for old in dropped:  # only after the new checkpoint is complete
            trainer.strategy.remove_checkpoint(folder.checkpoints / old)

    def best_checkpoint(self) -> Path | None:
        """Return the checkpoint with the lowest validation loss, or None if there is none."""
        return self.folder.checkpoints / next(iter(self.best)) if self.folder and self.best else None

    def state_dict(self) -> dict[str, Any]:
        """Return the best checkpoints, and whether validation is due, test data exists or a callback ended the run."""
        due = {"validation_due": self._validation_due, "tests": self._has_test_data}
        return {"best": dict(self.best), **due, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best checkpoints, and whether a validation run is due."""
        state = validate_callback_state(state_dict, CheckpointingState, self.state_key)
        # Files that are no longer among the best are deleted, so they must be in the checkpoints folder.
        self.best = {name: loss for name, loss in state["best"].items() if re.fullmatch(r"step=\d+\.ckpt", name)}
        self._validation_due = state.get("validation_due", False)


class StopBetweenSteps(BetweenSteps, ABC):
    """Base class for callbacks that save ``last.ckpt`` and stop all ranks once any rank has received a signal.

    All ranks stop after the same optimizer step.

    Args:
        checkpoints: The callback that saves ``last.ckpt``, or None if the run saves no checkpoints.
    """

    def __init__(self, checkpoints: Checkpointing | None) -> None:
        self.checkpoints = checkpoints
        self.signum = 0
        """Number of the received signal, or 0 if none has been received."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Create the reducer with which all ranks agree to stop; must be called on every rank."""
        self._reducer, self._first_step = HostReducer(collective_timeout(trainer)), -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step at which this process starts training."""
        self._first_step = trainer.global_step

    def between_steps(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Save ``last.ckpt`` and stop if any rank has received a signal."""
        if self._signal_received():
            if self.checkpoints and trainer.global_step > self._first_step:
                self.checkpoints.save_last(trainer)
            self.stop(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop immediately if a signal arrives during validation; ``last.ckpt`` was saved before validation."""
        if is_validating_between_steps(trainer) and self._signal_received():
            self.stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Synchronize signals that arrived too late to stop the run, so that all ranks exit with the same code."""
        self._signal_received()

    @abstractmethod
    def stop(self, trainer: L.Trainer) -> NoReturn:
        """Exit the process; called on every rank."""

    def _signal_received(self) -> bool:
        """Return whether any rank has received a signal; must be called on every rank."""
        agreed = self._reducer.max(self.signum)
        self.signum = self.signum or agreed  # a signal received during the all-reduce is handled by the next call
        return bool(agreed)
