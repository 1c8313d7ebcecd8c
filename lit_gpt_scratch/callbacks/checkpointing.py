"""Checkpoints of a run, and the run directory they are written to."""

import math
import time
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint, Timer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt_scratch.checkpoint.loop_state import count_finished_epochs
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.distributed.collectives import HostReducer
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.lightning_compat import (
    can_stop_early,
    is_accumulating,
    is_validating_between_steps,
    set_logging_step,
)


class RunDirCallback(Callback):
    """Knows the run's folder on every rank; ``None`` in a ``fast_dev_run``, which leaves nothing behind.

    ``fit`` sets ``folder`` on the first rank. By hand nobody does, and the logger's folder is the run's.
    """

    folder: RunFolder | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask the first rank; all ranks have to ask, because asking is a collective."""
        self.folder = trainer.strategy.broadcast(self.folder)
        if self.folder is None:
            log_dir = trainer.log_dir
            fast_dev_run: int = trainer.fast_dev_run  # type: ignore[attr-defined]  # the trainer sets it late
            self.folder = RunFolder(Path(log_dir)) if log_dir and not fast_dev_run else None


class ValidateAtEnd(Callback):
    """Tell the trainer to stop at the last step, instead of letting it run out of steps.

    A trainer that is told to stop validates first; one that reaches ``max_steps`` between two validations
    does not.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Recognise the last step."""
        if limit_reached(trainer):
            trainer.should_stop = True


def limit_reached(trainer: L.Trainer) -> bool:
    """Whether the steps or epochs of a run are over, as of the end of a batch; the same on all ranks."""
    steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
    return steps or (last_epoch and trainer.is_last_batch)


def time_is_up(trainer: L.Trainer) -> bool:
    """Whether the time of a run is over, by the clock of this rank: others may not have come to it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    left = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
    return any(seconds is not None and seconds <= 0 for seconds in left)


class Checkpointing(RunDirCallback, Checkpoint):
    """Keep ``last.ckpt`` to go on from, and the best models by validation loss.

    ``last.ckpt`` is written between two optimizer steps: when the one before is done and logged, and never amid the
    micro-batches of one, whose gradients would be lost. It is also written before a validation, which a resumed run
    then does first, and after it.

    Args:
        every_n_steps: Optimizer steps between saves of ``last.ckpt``; it is also saved at each validation and at the
            end.
        every_minutes: Minutes after which to save it in any case; None saves by steps alone.
        keep_best: How many of the best models to keep, as ``step=N.ckpt``.
        background: Write files while the training goes on, from a copy of the state in memory.

    Raises:
        UserError: A number is out of its range.
    """

    STATE_KEY: ClassVar = "Checkpoints"

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
        """Validation loss of each kept model, by file name, best first."""
        self.untested = False
        """Whether nothing but its test is missing of the run that goes on; who goes on with it says so."""
        self._tests = False
        self._validation_due = False
        self._saved: int | None = None
        self._saved_at = 0.0
        self._stop_asked = False
        self._stopped = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the trainer begin a run of which only the last validation, or the test, is missing; it would not."""
        loop = trainer.fit_loop
        self._limits = loop.epoch_loop.max_steps, loop.max_epochs
        if self.untested or checkpoint["callbacks"].get(self.state_key, {}).get("validation_due"):
            if 0 < loop.epoch_loop.max_steps <= checkpoint["global_step"]:
                loop.epoch_loop.max_steps = checkpoint["global_step"] + 1
            epochs = count_finished_epochs(checkpoint["loops"]["fit_loop"])
            if 0 < (loop.max_epochs or 0) <= epochs:
                loop.max_epochs = epochs + 1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin such a run, too, if its time is up; callbacks that save come after the timer."""
        self._stops = trainer.should_stop or self.untested
        if self._validation_due or self.untested:
            trainer.should_stop = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear away what a kill left half-written, and do the validation that it prevented."""
        self._agreement = HostReducer()
        self._tests = bool(getattr(trainer.datamodule, "test_dataset", None))  # type: ignore[attr-defined]  # set late
        self._saved = trainer.global_step or None  # a resumed run has its checkpoint already
        self._saved_at = time.monotonic()
        if self.folder:
            kept = {name: loss for name, loss in self.best.items() if (self.folder.checkpoints / name).is_file()}
            self.best = trainer.strategy.broadcast(kept)  # a checkpoint from elsewhere speaks of files that are there
            if trainer.is_global_zero:
                self.folder.remove_unfinished()
        if self._validation_due or self.untested:
            self._make_up(trainer)
            self.untested = False

    def _make_up(self, trainer: L.Trainer) -> None:
        """Do the validation of the step before with the numbers of step and epoch that it would have had.

        A test that comes next finds those that it would have found.
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
        trainer.should_stop = trainer.should_stop or self._stops
        loop.epoch_progress.current.completed += epoch_over
        set_logging_step(trainer, trainer.global_step)
        ends = trainer.should_stop or 0 < loop.epoch_loop.max_steps <= trainer.global_step
        if ends and not epoch_over:
            loop.epoch_progress.increment_processed()
            loop.epoch_progress.increment_completed()
        self._validation_due = False  # also where there is no validation any more

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save ``last.ckpt`` at its intervals."""
        if batch_idx % trainer.accumulate_grad_batches or self._saved == trainer.global_step or not trainer.global_step:
            return
        if trainer.global_step % self.every_n_steps == 0 or self._is_time():
            self.save_last(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let nothing stop the run amid a step: not a timer, and not a validation that comes there."""
        if is_accumulating(trainer):
            self._stop_asked, trainer.should_stop = self._stop_asked or trainer.should_stop, False
        elif self._stop_asked:
            trainer.should_stop = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save all that was trained: a validation can be long, and can fail."""
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
            self._stop_asked, trainer.should_stop = self._stop_asked or trainer.should_stop, False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what no earlier moment was right for, if this is the end; later others may change the weights.

        An average of the weights, say, takes their place when the training ends.
        """
        if trainer.should_stop or limit_reached(trainer):
            news = self._saved != trainer.global_step or self._stopped != self._stops_early(trainer)
            if self._agreement.max(news):
                self.save_last(trainer)

    def save_last(self, trainer: L.Trainer) -> None:
        """Write ``last.ckpt``, and the curves up to it; every rank has to ask."""
        if self.folder:
            self._saved, self._saved_at = trainer.global_step, time.monotonic()
            self._stopped = self._stops_early(trainer)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                    logger.experiment.flush()  # it would keep points back for minutes, and a kill would lose them
            trainer.save_checkpoint(self.folder.last)

    def _stops_early(self, trainer: L.Trainer) -> bool:
        """Whether a callback ended the run; the first rank's answer is the one that is saved."""
        asked = trainer.should_stop and can_stop_early(trainer)  # not before min_steps and min_epochs
        return asked and not limit_reached(trainer) and not time_is_up(trainer)

    def _is_time(self) -> bool:
        if self.every_minutes is None:
            return False
        return bool(self._agreement.max(time.monotonic() - self._saved_at >= 60 * self.every_minutes))

    def _save_best(self, trainer: L.Trainer, folder: RunFolder, loss: float) -> None:
        name = f"step={trainer.global_step}.ckpt"
        ranked = dict(sorted({**self.best, name: loss}.items(), key=lambda item: item[1]))
        kept = dict(list(ranked.items())[: self.keep_best])
        dropped = self.best.keys() - kept.keys()
        self.best = kept
        if name in kept:
            trainer.save_checkpoint(folder.checkpoints / name)
        for old in dropped:  # only now: until the new one is whole, the old one is the best there is
            trainer.strategy.remove_checkpoint(folder.checkpoints / old)

    @property
    def state_key(self) -> str:
        """Name of this callback's state in checkpoints, unchanged since 0.1 so that older checkpoints load."""
        return self.STATE_KEY

    def state_dict(self) -> dict[str, Any]:
        """The best so far, what is still to be done, this step's validation or a test, and if a callback ended it."""
        due = {"validation_due": self._validation_due, "tests": self._tests}
        return {"best": dict(self.best), **due, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best so far."""
        self.best = dict(state_dict["best"])
        self._validation_due = state_dict.get("validation_due", False)
