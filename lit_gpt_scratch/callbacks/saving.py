"""Checkpoints of a run."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lit_gpt_scratch.callbacks.in_run_folder import InRunFolder
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.errors import UserError


class Checkpoints(InRunFolder, Checkpoint):
    """Keep ``last.ckpt`` to go on from, and the best models by validation loss.

    Args:
        every_n_steps: Optimizer steps between saves of ``last.ckpt``; it is also saved after each validation.
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
        self._saved_step = -1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save ``last.ckpt`` at its interval."""
        step = trainer.global_step
        if self.folder and step % self.every_n_steps == 0 and step != self._saved_step:
            self._save_last(trainer, self.folder)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save ``last.ckpt``, and the model if it is among the best."""
        if self.folder is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and self.keep_best:
            self._save_best(trainer, self.folder, loss.item())
        self._save_last(trainer, self.folder)

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

    def _save_last(self, trainer: L.Trainer, folder: RunFolder) -> None:
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(folder.last)

    def state_dict(self) -> dict[str, Any]:
        """Which models are the best so far."""
        return {"best": dict(self.best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best so far."""
        self.best = dict(state_dict["best"])
