"""Which classes are taken for which, as a picture."""

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lit_gpt_scratch.tasks import Classification

CELL, MARGIN, LETTER = 72, 12, 7
"""Pixels of a cell, of the room around, and of a letter."""
BLUE, PAPER, INK = (31, 119, 180), (255, 255, 255), (30, 30, 30)


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
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                step = trainer.global_step - 1  # as Lightning numbers a validation
                logger.experiment.add_image(f"{side}/confusion", picture, step, dataformats="HWC")


def draw(counts: NDArray[np.int64], names: list[str]) -> NDArray[np.uint8]:
    """The picture of a confusion matrix.

    Args:
        counts: (n, n): of the texts of the class of a row, how many were taken for that of a column.
        names: (n,) of the classes.

    Returns:
        (height, width, 3) uint8.
    """
    font = ImageFont.load_default()
    left = MARGIN + LETTER * max(map(len, names))
    top = 3 * MARGIN
    image = Image.new("RGB", (left + CELL * len(names) + MARGIN, top + CELL * len(names) + MARGIN), PAPER)
    pen = ImageDraw.Draw(image)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for row, name in enumerate(names):
        pen.text((left - 6, top + CELL * (row + 0.5)), name, INK, font, anchor="rm")
        pen.text((left + CELL * (row + 0.5), top - 6), name[: CELL // LETTER], INK, font, anchor="mb")
        for column in range(len(names)):
            share = float(shares[row, column])
            shade = tuple(round(paper + (blue - paper) * share) for paper, blue in zip(PAPER, BLUE, strict=True))
            corner = left + CELL * column, top + CELL * row
            pen.rectangle((*corner, corner[0] + CELL - 1, corner[1] + CELL - 1), shade, (200, 200, 200))
            middle = corner[0] + CELL / 2, corner[1] + CELL / 2
            pen.text(middle, f"{counts[row, column]:,}", PAPER if share > 0.5 else INK, font, anchor="mm")
    return np.asarray(image)
