"""A run ends with a validation, whatever the intervals are."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback


class ValidateAtEnd(Callback):
    """Tell the trainer to stop at the last step, instead of letting it run out of steps.

    A trainer that is told to stop validates first; one that reaches ``max_steps`` between two validations
    does not.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Recognise the last step."""
        steps_done = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        if steps_done or (last_epoch and trainer.is_last_batch):
            trainer.should_stop = True
