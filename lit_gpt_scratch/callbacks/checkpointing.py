"""Whether to save and to stop after each optimizer step; the run directory, and other bases of callbacks."""

import math
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, Checkpoint, Timer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt_scratch.checkpoint.loop_state import count_finished_epochs
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.lightning_compat import (
    can_stop_early,
    is_accumulating,
    is_validating_between_steps,
    set_logging_step,
)


class RunDirCallback(Callback):
    """A callback that writes to the run directory.

    Attributes:
        folder: The run directory, known on every rank from ``setup`` on; None in a ``fast_dev_run``, which writes
            nothing. ``fit`` sets it on rank 0; without that, the logger's directory is used.
    """

    folder: RunFolder | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Broadcast the run directory from rank 0 (a collective)."""
        self.folder = trainer.strategy.broadcast(self.folder)
        if self.folder is None:
            log_dir = trainer.log_dir
            fast_dev_run: int = trainer.fast_dev_run  # type: ignore[attr-defined]  # the trainer sets it late
            self.folder = RunFolder(Path(log_dir)) if log_dir and not fast_dev_run else None


class BetweenSteps(Callback):
    """A callback that acts between two optimizer steps: before the first micro-batch of a step.

    Attributes:
        due: Whether to act before the next step.
    """

    due: bool = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called before each micro-batch."""
        if self.due and batch_idx % trainer.accumulate_grad_batches == 0:
            self.between_steps(trainer, pl_module, batch)

    def between_steps(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Act.

        Args:
            trainer: The run's trainer.
            pl_module: The task.
            batch: The next micro-batch.
        """
        raise NotImplementedError


class PeriodicCallback(Callback):
    """A callback that measures optimizer steps at an interval, the first step included.

    Attributes:
        every_n_steps: Optimizer steps between measurements; 0 for never.
    """

    every_n_steps: int
    _step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the step that training starts from."""
        self._step = trainer.global_step

    def on_gradient(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called by ``GPTModule`` with the finished gradient."""
        if self._is_due(trainer.global_step + 1):
            self.measure_gradient(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each micro-batch."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._is_due(self._step):
                self.measure_step(trainer, pl_module)

    def measure_gradient(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure before the gradient is clipped and the step is taken; only of a ``GPTModule``."""

    def measure_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure after the step, ``trainer.global_step - 1`` as Lightning counts."""

    def _is_due(self, step: int) -> bool:
        """Whether a measurement is due after this step, counted from 1."""
        return self.every_n_steps > 0 and (step == 1 or step % self.every_n_steps == 0)


class HostReducer:
    """All-reduce of small integers over all ranks, through gloo, without synchronising the accelerator.

    Create it on all ranks at the same point, after the process group is initialised.
    """

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # With NCCL the host would wait for the device at every step.
        self._group = dist.new_group(backend="gloo") if distributed else None

    def max(self, value: int) -> int:
        """Maximum of the values of all ranks; every rank must call it."""
        if self._group is None:
            return value
        values = torch.tensor(int(value))
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return int(values.item())


class ValidateAtEnd(Callback):
    """End every run with a validation, whatever ``val_check_interval`` is.

    A trainer whose ``should_stop`` is set validates before it stops; one that reaches ``max_steps`` between two
    validations does not. So this sets ``should_stop`` at the last step.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set ``should_stop`` at the last step."""
        if limit_reached(trainer):
            trainer.should_stop = True


def limit_reached(trainer: L.Trainer) -> bool:
    """Whether ``max_steps`` or ``max_epochs`` is reached at the end of this batch; the same on all ranks."""
    steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    return steps or (last_epoch and trainer.is_last_batch)


def time_is_up(trainer: L.Trainer) -> bool:
    """Whether ``max_time`` has passed on this rank; other ranks' clocks may differ."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    left = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
    return any(seconds is not None and seconds <= 0 for seconds in left)


class Checkpointing(BetweenSteps, RunDirCallback, Checkpoint):
    """Saves ``last.ckpt`` to resume from, and the best models by validation loss.

    ``last.ckpt`` is saved between two optimizer steps, after the earlier one was logged, and never between the
    micro-batches of one, whose accumulated gradients would be missing. It is also saved before a validation, which a
    resumed run then runs first, and after it.

    Args:
        every_n_steps: Optimizer steps between saves of ``last.ckpt``; it is also saved at each validation and at the
            end.
        every_minutes: Also save it after this many minutes; None saves by steps only.
        keep_best: How many of the best models to keep, as ``step=N.ckpt``.
        background: Write files in a thread while training continues, from a copy of the state in host memory.

    Raises:
        UserError: A number is out of range.
    """

    state_key = "Checkpoints"  # of its state in checkpoints, unchanged since 0.1

    def __init__(
        self,
        every_n_steps: int = 500,
        every_minutes: float | None = None,
        keep_best: int = 1,
        background: bool = False,
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
        self.best: dict[str, float] = {}
        """File name of each kept model to its validation loss, best first."""
        self.untested = False
        """Whether the resumed run misses only its test; set by the code that resumes it."""
        self._has_test_data = False
        self._validation_due = False
        self._saved: int | None = None
        self._saved_at = 0.0
        self._stop_requested = False
        self._stopped = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise the limits by one if only the last validation or the test is missing.

        A trainer that is at its limits does nothing.
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
        """Start such a run even if its time is up; ``Checkpoint`` callbacks run after the timer."""
        self._should_stop = trainer.should_stop or self.untested
        if self._validation_due or self.untested:
            trainer.should_stop = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove files that a kill left unfinished, and run the validation that it prevented."""
        self._reducer = HostReducer()
        self._has_test_data = bool(getattr(trainer.datamodule, "test_dataset", None))  # type: ignore[attr-defined]  # set late
        self._saved = trainer.global_step or None  # a resumed run has this checkpoint already
        self._saved_at = time.monotonic()
        if self.folder:
            kept = {name: loss for name, loss in self.best.items() if (self.folder.checkpoints / name).is_file()}
            self.best = trainer.strategy.broadcast(
                kept
            )  # a checkpoint copied from elsewhere may list files that are not here
            if trainer.is_global_zero:
                self.folder.remove_unfinished()
        if self._validation_due or self.untested:
            self._run_missed_validation(trainer)
            self.untested = False

    def _run_missed_validation(self, trainer: L.Trainer) -> None:
        """Run the validation of the previous step with the step and epoch counts that it would have had.

        A test that follows also sees the counts that it would have seen.
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
        self._validation_due = False  # also if validation has been switched off

    def between_steps(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Save ``last.ckpt`` at its intervals."""
        if self._saved == trainer.global_step or not trainer.global_step:
            return
        if trainer.global_step % self.every_n_steps == 0 or self._is_time():
            self.save_last(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Postpone ``should_stop`` to the end of the optimizer step; a timer can set it between micro-batches."""
        if not (trainer.should_stop or self._stop_requested):
            return
        if is_accumulating(trainer):
            self._stop_requested, trainer.should_stop = True, False
        elif self._stop_requested:
            trainer.should_stop = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save first: a validation can be long, and can fail."""
        if is_validating_between_steps(trainer) and self._saved != trainer.global_step:
            self._validation_due = True
            self.save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the model if it is among the best, and ``last.ckpt``."""
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
        """Save the last step if this is the end and it is not saved yet.

        ``on_train_end`` would be too late: the moving average replaces the weights there.
        """
        if trainer.should_stop or limit_reached(trainer):
            unsaved = self._saved != trainer.global_step or self._stopped != self._stops_early(trainer)
            if self._reducer.max(unsaved):
                self.save_last(trainer)

    def save_last(self, trainer: L.Trainer) -> None:
        """Write ``last.ckpt``, and flush the logged curves up to it; to be called on every rank."""
        if self.folder:
            self._saved, self._saved_at = trainer.global_step, time.monotonic()
            self._stopped = self._stops_early(trainer)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                    logger.experiment.flush()  # it buffers points for minutes; a kill would lose them
            trainer.save_checkpoint(self.folder.last)

    def _stops_early(self, trainer: L.Trainer) -> bool:
        """Whether a callback stopped the run; rank 0's answer is saved."""
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
            trainer.save_checkpoint(folder.checkpoints / name)
        for old in dropped:  # only after the new one is complete
            trainer.strategy.remove_checkpoint(folder.checkpoints / old)

    def state_dict(self) -> dict[str, Any]:
        """The best models, whether a validation or test is still due, and whether a callback stopped the run."""
        due = {"validation_due": self._validation_due, "tests": self._has_test_data}
        return {"best": dict(self.best), **due, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best models and whether a validation is due."""
        self.best = dict(state_dict["best"])
        self._validation_due = state_dict.get("validation_due", False)


class StopBetweenSteps(BetweenSteps, ABC):
    """Stops all ranks after the same optimizer step once one of them received a signal, and saves ``last.ckpt`` first.

    Args:
        checkpoints: Saves ``last.ckpt``; None if the run saves nothing.
    """

    def __init__(self, checkpoints: Checkpointing | None) -> None:
        self.checkpoints = checkpoints
        self.signum = 0
        """The signal received, or 0."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Prepare for the ranks to agree (a collective)."""
        self._reducer, self._first_step = HostReducer(), -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the step that this process starts from."""
        self._first_step = trainer.global_step

    def between_steps(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Save and stop if any rank received a signal."""
        if self._signal_received():
            if self.checkpoints and trainer.global_step > self._first_step:
                self.checkpoints.save_last(trainer)
            self.stop(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """During validation: stop at once; the weights were saved before it began."""
        if is_validating_between_steps(trainer) and self._signal_received():
            self.stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Agree on a signal that came too late to stop the run, so that all ranks exit alike."""
        self._signal_received()

    @abstractmethod
    def stop(self, trainer: L.Trainer) -> NoReturn:
        """Exit this process; called on every rank."""

    def _signal_received(self) -> bool:
        """Whether any rank received a signal (a collective)."""
        agreed = self._reducer.max(self.signum)
        self.signum = self.signum or agreed  # a signal during the collective counts next time
        return bool(agreed)
