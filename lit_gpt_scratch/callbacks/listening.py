"""Hearing what the loggers are told."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from typing_extensions import override

from lit_gpt_scratch.diagnosis.examination import Examination


class Listener(Logger):
    """A logger that lets an examination see each number, whoever measured it, and keeps nothing on disk."""

    def __init__(self, examination: Examination) -> None:
        super().__init__()
        self.examination = examination

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.examination.see(step or 0, {name: float(value) for name, value in metrics.items()})

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Flags are nothing that was measured."""

    @property
    @override
    def name(self) -> str:
        return "listener"

    @property
    @override
    def version(self) -> str:
        return ""


def note(trainer: L.Trainer, name: str, text: str, step: int) -> None:
    """Put a text into TensorBoard, and let those who listen know of it."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(name, text, step)
        elif isinstance(logger, Listener):
            logger.examination.note(step, name, text)
