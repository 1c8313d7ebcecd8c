"""A run ends with a validation, whatever the intervals are."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Timer


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
