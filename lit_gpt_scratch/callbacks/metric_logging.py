"""What callbacks measure, under names that stay: for the loggers, and for each other.

Whoever judges a run (the doctor, a user's own callback) reads names, and needs not know who measured them: in a run
``trainer.logged_metrics``, the same on every rank, beside what Lightning itself logs; afterwards the run's events.
A name is there from its first measurement on. Layers count from 1; ``PART`` is one of ``embedding``, ``attention``,
``feed_forward``, ``norms`` and ``head``, as far as the network has it and it is trained.

Every ``inspect.every_n_steps`` optimizer steps, and at the first (``dynamics.py``, ``inspection.py``):

- ``dynamics/gradient_norm/PART``, ``dynamics/gradient_norm/layer_N``: Euclidean, before clipping; the squares of the
  parts add up to that of ``train/gradient_norm``.
- ``dynamics/update_ratio/PART``: norm of what the step changed by the norm of the weights before it.
- ``dynamics/dead_units``, ``dynamics/dead_units/layer_N``: share of the feed-forward units that are (all but) zero at
  every inspected token.
- ``dynamics/logit_norm``: Euclidean norm of the logits of a token, mean over the inspected ones.
- ``dynamics/stream_norm/layer_N``: root mean square of the stream behind a block.
- ``attention/entropy``, ``attention/distance``, ``attention/sink``, and each with ``/layer_N``: nats, tokens, and the
  share that goes to the first token; means over heads, layers and all tokens that have more than themselves to see.
- ``attention/sink/most``: of the head that gives the first token the greatest share.

At every validation (``token_losses.py``):

- ``loss_by_position/A-B``: mean loss of the labels at places A to B of a window, counted from 0.
- ``loss_by_frequency/A-B``: mean loss of the A-th to B-th most frequent tokens of the training, counted from 1.

At log points (``throughput.py``): ``throughput/...``.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from typing_extensions import override

from lit_gpt_scratch.diagnostics.rule_engine import RuleEngine


def log_metrics(trainer: L.Trainer, values: Mapping[str, float], step: int) -> None:
    """Make measurements known, on all ranks alike.

    Not by ``LightningModule.log``, which cannot be called after a validation and takes several times as long, to reduce
    over ranks what all have already.

    Args:
        trainer: Of the run.
        values: By name.
        step: The last step that was done, as Lightning numbers them: from 0.
    """
    trainer.logged_metrics.update(values)  # type: ignore[arg-type]  # numbers are as good as tensors of one
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step)


def tensorboard_writers(trainer: L.Trainer) -> list[SummaryWriter]:
    """Where texts and pictures go: TensorBoard's writers, on the first rank."""
    kept = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in kept] if trainer.is_global_zero else []


class MetricTap(Logger):
    """A logger that lets an examination see each number, whoever measured it, and keeps nothing on disk."""

    def __init__(self, examination: RuleEngine) -> None:
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


def log_text(trainer: L.Trainer, name: str, text: str, step: int) -> None:
    """Put a text into TensorBoard, and let those who listen know of it."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(name, text, step)
        elif isinstance(logger, MetricTap):
            logger.examination.note(step, name, text)
