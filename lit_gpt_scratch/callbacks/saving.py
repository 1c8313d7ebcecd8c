"""Checkpoints of a run."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lit_gpt_scratch.callbacks.in_run_folder import InRunFolder
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.errors import UserError


class Checkpoints(InRunFolder, Checkpoint):
    """Keep ``last.ckpt`` to go on from, and the best models by validation loss.

    ``last.ckpt`` is only ever written between two optimizer steps, never amid the micro-batches of one, whose
    gradients would be lost.

    Args:
        every_n_steps: Optimizer steps between saves of ``last.ckpt``; it is also saved after each validation
            and at the end.
        keep_best: How many of the best models to keep, as ``step=N.ckpt``.

    Raises:
        UserError: A number is out of its range.
    """

    def __init__(self, every_n_steps: int = 500, keep_best: int = 1) -> None:
        if every_n_steps < 1:
            raise UserError(f"checkpoint.every_n_steps is {every_n_steps}; it must be at least 1")
        if keep_best < 0:
            raise UserError(f"checkpoint.keep_best is {keep_best}; it must be 0 or more")
        self.every_n_steps = every_n_steps
        self.keep_best = keep_best
        self.best: dict[str, float] = {}
        """Validation loss of each kept model, by file name, best first."""
        self._step = 0
        self._between_steps = True
        self._saved: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A resumed run has its checkpoint already."""
        self._step = trainer.global_step
        self._saved = trainer.global_step or None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save ``last.ckpt`` at its interval, and when the run stops here."""
        self._between_steps, self._step = trainer.global_step != self._step, trainer.global_step
        due = self._step % self.every_n_steps == 0 or trainer.should_stop
        if self._between_steps and due and not _ends_an_epoch_and_the_run(trainer):
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the model if it is among the best, and ``last.ckpt``."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = trainer.callback_metrics.get("val/loss")
        if self.folder and self.keep_best and loss is not None and math.isfinite(loss):
            self._save_best(trainer, self.folder, loss.item())
        if self._between_steps and not _ends_an_epoch_and_the_run(trainer):
            self._save_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what no earlier moment was right for."""
        if self._saved != trainer.global_step:
            self._save_last(trainer)

    def _save_best(self, trainer: L.Trainer, folder: RunFolder, loss: float) -> None:
        name = f"step={trainer.global_step}.ckpt"
        ranked = dict(sorted({**self.best, name: loss}.items(), key=lambda item: item[1]))
        kept = dict(list(ranked.items())[: self.keep_best])
        dropped = self.best.keys() - kept.keys()
        self.best = kept
        if name in kept:
            trainer.save_checkpoint(folder.checkpoints / name)
        for old in dropped:
            trainer.strategy.remove_checkpoint(folder.checkpoints / old)

    def _save_last(self, trainer: L.Trainer) -> None:
        if self.folder:
            self._saved = trainer.global_step
            trainer.save_checkpoint(self.folder.last)

    def state_dict(self) -> dict[str, Any]:
        """Which models are the best so far."""
        return {"best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best so far."""
        self.best = dict(state_dict["best"])


def _ends_an_epoch_and_the_run(trainer: L.Trainer) -> bool:
    """Whether to wait for ``on_train_end``, when the epoch is counted.

    Resumed from within the last batch or its validation, Lightning 2.6 would train one step too many; saved
    at the end amid an epoch, it would skip the rest of that epoch.
    """
    return trainer.should_stop and trainer.is_last_batch
