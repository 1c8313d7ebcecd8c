"""Which classes are taken for which, as a picture."""

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from lit_gpt_scratch.callbacks import drawing
from lit_gpt_scratch.callbacks.measured import boards
from lit_gpt_scratch.tasks import Classification


class Confusion(Callback):
    """The confusion matrix after each validation, and of the test, into TensorBoard's tab of images.

    A row is a class, a column what its texts were taken for; a cell says how many, and is as dark as its share of the
    row.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of the validation."""
        if not trainer.sanity_checking:
            self._show(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of the test."""
        self._show(trainer, pl_module, "test")

    def _show(self, trainer: L.Trainer, pl_module: L.LightningModule, side: str) -> None:
        if not trainer.is_global_zero or not isinstance(pl_module, Classification):
            return
        picture = draw(pl_module.confusion.cpu().numpy(), pl_module.labelled.class_names)
        for board in boards(trainer):  # the step as Lightning numbers a validation
            board.add_image(f"{side}/confusion", picture, trainer.global_step - 1, dataformats="HWC")


def draw(counts: NDArray[np.int64], names: list[str]) -> NDArray[np.uint8]:
    """The picture of a confusion matrix.

    Args:
        counts: (n, n): of the texts of the class of a row, how many were taken for that of a column.
        names: (n,) of the classes.

    Returns:
        (height, width, 3) uint8.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return drawing.table(shares, [[f"{count:,}" for count in row] for row in counts.tolist()], names, names)
