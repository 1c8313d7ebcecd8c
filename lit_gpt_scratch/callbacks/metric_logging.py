"""Logging metrics, images and texts from callbacks, and the names under which they are logged.

A consumer of metrics (the diagnostics, a user's own callback) reads them by name, whoever measured them: during a run
from ``trainer.logged_metrics``, the same on every rank, together with what Lightning itself logs; afterwards from the
run's TensorBoard events. A name exists from its first measurement on. Layers count from 1; ``PART`` is one of
``embedding``, ``attention``, ``feed_forward``, ``norms`` and ``head``, if the network has it and it is trained.

Every ``inspect.every_n_steps`` optimizer steps, and at the first (``introspection.py``):

- ``dynamics/gradient_norm/PART``, ``dynamics/gradient_norm/layer_N``: L2 norm before clipping; the squares of the parts
  add up to that of ``train/gradient_norm``.
- ``dynamics/update_ratio/PART``: norm of the step's weight update over the norm of the weights before it.
- ``dynamics/dead_units``, ``dynamics/dead_units/layer_N``: share of the feed-forward units that are (nearly) zero at
  every inspected token.
- ``dynamics/logit_norm``: L2 norm of a token's logits, mean over the inspected tokens.
- ``dynamics/stream_norm/layer_N``: root mean square of the residual stream after a block.
- ``attention/entropy``, ``attention/distance``, ``attention/sink``, and each with ``/layer_N``: entropy in nats, mean
  distance in tokens, and the attention share of the first token; means over heads, layers and all tokens that can
  attend to more than themselves.
- ``attention/sink/most``: the largest such share of any head.

At every validation (``loss_breakdown.py``):

- ``loss_by_position/A-B``: mean loss of the labels at positions A to B of a window, counted from 0.
- ``loss_by_frequency/A-B``: mean loss of the A-th to B-th most frequent tokens of the training data, counted from 1.

At log points (``throughput.py``): ``throughput/...``.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from typing_extensions import override

from lit_gpt_scratch.diagnostics.rule_engine import RuleEngine


def log_metrics(trainer: L.Trainer, values: Mapping[str, float], step: int) -> None:
    """Log values that are the same on all ranks; to be called on all of them.

    ``LightningModule.log`` cannot be called after a validation, and takes several times as long to reduce over ranks
    what all of them already have.

    Args:
        trainer: The run's trainer.
        values: Metrics by name.
        step: Number of the last finished step, from 0 as Lightning counts.
    """
    trainer.logged_metrics.update(values)  # type: ignore[arg-type]  # plain numbers work like scalar tensors
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step)


def tensorboard_writers(trainer: L.Trainer) -> list[SummaryWriter]:
    """TensorBoard's writers, for texts and images; none on ranks other than 0."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []


def log_text(trainer: L.Trainer, name: str, text: str, step: int) -> None:
    """Log a Markdown text to TensorBoard and to every ``MetricTap``."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(name, text, step)
        elif isinstance(logger, MetricTap):
            logger.engine.add_text(step, name, text)


class MetricTap(Logger):
    """A logger that passes every metric to a rule engine, and writes nothing to disk.

    Args:
        engine: The rule engine.
        on_metrics: Called after each call of ``log_metrics``.
    """

    def __init__(self, engine: RuleEngine, on_metrics: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.engine = engine
        self.on_metrics = on_metrics

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.engine.add_metrics(step or 0, {name: float(value) for name, value in metrics.items()})
        self.on_metrics()

    @override
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters are no metrics."""

    @property
    @override
    def name(self) -> str:
        return "metric_tap"

    @property
    @override
    def version(self) -> str:
        return ""
