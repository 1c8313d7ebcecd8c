"""Log metrics, images and text from callbacks. The metric names are listed below.

Consumers of metrics, such as the diagnostics or custom callbacks, read them by name: during a run from
``trainer.logged_metrics``, which holds the same values on every rank and includes the metrics that Lightning itself
logs, and after the run from its TensorBoard events. A metric exists once it has been measured. Layer numbers start at
one. ``PART`` is one of ``embedding``, ``attention``, ``feed_forward``, ``norms`` and ``head``; parts without trainable
parameters are omitted.

At the first optimizer step and every ``inspect.every_n_steps`` steps (``introspection.py``):

- ``dynamics/gradient_norm/PART``, ``dynamics/gradient_norm/layer_N``: L2 norm before clipping; the squared
  norms of the parts add up to the square of ``train/gradient_norm``.
- ``dynamics/update_ratio/PART``: norm of the step's weight update divided by the norm of the weights before the step.
- ``dynamics/dead_units``, ``dynamics/dead_units/layer_N``: fraction of feed-forward units that are (nearly) zero at
  every inspected token.
- ``dynamics/logit_norm``: mean L2 norm of a token's logits over the inspected tokens.
- ``dynamics/stream_norm/layer_N``: root mean square of the residual stream after block N.
- ``attention/entropy``, ``attention/distance``, ``attention/sink``: entropy in nats, mean distance in tokens, and
  fraction of the attention on the first token; averaged over heads, layers and all tokens that can attend to other
  tokens besides themselves. The averages for layer N have the suffix ``/layer_N``.
- ``attention/sink/most``: maximum of ``attention/sink`` across all heads and layers.

After every validation run (``loss_breakdown.py``):

- ``loss_by_position/A-B``: mean loss at positions A to B of a window, counted from 0.
- ``loss_by_frequency/A-B``: mean loss on the A-th to B-th most frequent tokens in the training data, counted from 1.

Every ``trainer.log_every_n_steps`` steps (``throughput.py``): ``throughput/...``, and for a mixture of experts
``experts/...`` (see ``tasks.expert_balancing.ExpertBalancing.metrics``).
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
    """Log values that are the same on all ranks; must be called on every rank.

    ``LightningModule.log`` cannot be called in ``on_validation_end``, and it takes several times as long because it
    reduces the values across ranks.

    Args:
        trainer: The trainer of the run.
        values: Metric values keyed by name.
        step: Index of the last completed optimizer step, counted from 0 as in Lightning.
    """
    trainer.logged_metrics.update(values)  # type: ignore[arg-type]  # plain numbers work like scalar tensors
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step)


def tensorboard_writers(trainer: L.Trainer) -> list[SummaryWriter]:
    """Return the TensorBoard writers for text and images; the list is empty on ranks other than 0."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []


def log_text(trainer: L.Trainer, name: str, text: str, step: int) -> None:
    """Log Markdown text to TensorBoard and to every ``MetricTap``."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(name, text, step)
        elif isinstance(logger, MetricTap):
            logger.engine.add_text(step, name, text)


class MetricTap(Logger):
    """Logger that passes every metric to a rule engine and writes nothing to disk.

    Args:
        engine: Rule engine that receives the metrics.
        on_metrics: Function called after each ``log_metrics`` call.
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
        """Do nothing, because hyperparameters are not metrics."""

    @property
    @override
    def name(self) -> str:
        return "metric_tap"

    @property
    @override
    def version(self) -> str:
        return ""
