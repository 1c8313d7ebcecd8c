"""What every stage of the lineage does with a batch: step on its loss, weighed right, and measure."""

from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer
from torchmetrics import Metric, MetricCollection

from lit_gpt_scratch.hardware.parallel import settle_gradients
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.optim import OptimizerRecipe, Schedule
from lit_gpt_scratch.optim.parts import gradients, own_part, total_norm
from lit_gpt_scratch.tasks.base import Task


class Stage(Task):
    """A task with a loss that is a sum over labels, an optimizer by recipe, and metrics.

    Subclasses say what is lost on a batch (``losses``), what is measured (``build_metrics`` and ``measure``), and have
    a network ``net``. A batch has ``labels``.

    Args:
        optimizer: Which optimizer, with its learning rate.
        schedule: The learning rate over the run.
        ema_decay: See ``Task``.

    Attributes:
        metrics: What validation and test measure.
        total_steps: Optimizer steps of the run, infinite as long as that is not known.
    """

    net: GPT
    metrics: Metric | MetricCollection

    def __init__(self, optimizer: OptimizerRecipe, schedule: Schedule, ema_decay: float | None) -> None:
        super().__init__(ema_decay)
        self.optimizer = optimizer
        self.schedule = schedule
        self.total_steps = float("inf")

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The summed loss of a batch, and over how many labels it is summed, or how much they weigh: two scalars."""
        raise NotImplementedError

    def positions(self, batch: Any) -> int:
        """How many labels there could be: as many in every micro-batch of a step, and on every rank."""
        return int(batch["labels"].numel())

    def apart(self, batch: Any) -> list[Any]:
        """What the data module dealt out in a batch, each as a batch of its own; nothing of what it does not have."""
        n = len(batch["labels"])
        return [{name: rows[place : place + 1] for name, rows in batch.items()} for place in range(n)]

    @property
    def learned(self) -> nn.Module:
        """What the optimizer updates."""
        return self.net

    @property
    def at_log_point(self) -> bool:
        """Whether the step that is being made is logged."""
        step = self.trainer.global_step
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
        return bool(every) and (step == 0 or (step + 1) % every == 0)

    def build_metrics(self) -> Metric | MetricCollection:
        """What validation and test measure; its ``compute`` gives figures by name."""
        raise NotImplementedError

    def measure(self, batch: Any) -> Tensor | None:
        """Add a batch to ``metrics``.

        Returns:
            What was lost at each label, which callbacks get as the outputs of a validation step: (B, T), or (B,) where
            a row has one label; 0 where there is none. None of a loss that is of no label.
        """
        raise NotImplementedError

    @property
    def uneven(self) -> bool:
        """Whether some batches of the training have fewer labels than others."""
        return bool(self.trainer.datamodule.uneven)  # type: ignore[attr-defined]  # the trainer sets it late

    def on_train_start(self) -> None:
        """Learn how long the run is.

        Not earlier: asking for it loads the training data, and that has to wait until a resumed trainer
        knows where it stands.
        """
        super().on_train_start()
        self.total_steps = self.trainer.estimated_stepping_batches
        self._use_own_hyperparameters()
        self._lost = torch.zeros((), device=self.device)
        self._counted = torch.zeros((), device=self.device, dtype=torch.int64)
        self._micro_batches = 0

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The recipe's optimizer, with the schedule stepped after every update."""
        optimizer = self.optimizer.build(self.learned)
        self.average.follow(optimizer, lambda: self.trainer.global_step)
        scheduler = LambdaLR(optimizer, lambda step: self.schedule.factor(step, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _use_own_hyperparameters(self) -> None:
        """What the flags say of the optimizer, not what a checkpoint says; only its memory of gradients stays."""
        fresh = self.optimizer.build(self.learned)
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        scheduler.base_lrs = [group["lr"] for group in fresh.param_groups]
        factor = self.schedule.factor(self.trainer.global_step, self.total_steps)
        for group, own in zip(self.trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
            group["initial_lr"], group["lr"] = own["lr"], own["lr"] * factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The summed loss by the positions that could have a label; all have one, but where batches are filled up."""
        lost, counted = self.losses(batch)
        self._lost = self._lost + lost.detach()
        self._counted = self._counted + counted
        self._micro_batches += 1
        self._positions = self.positions(batch)
        loss: Tensor = lost / self._positions
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Weigh the gradient, show it, and log the step's loss at log points alone: reading it costs a sync.

        Callbacks see the gradient before this. Those that have a method ``on_gradient(trainer, task)`` see it here, as
        that of the mean over the step's labels, and not clipped yet.
        """
        if self.device_mesh is not None:
            settle_gradients(self.net, self.device_mesh)
        if self.uneven or self._micro_batches != self.trainer.accumulate_grad_batches:
            self._weigh_gradient()
        if self.at_log_point or self.judge is not None:
            sums = torch.stack((self._lost, self._counted.to(self._lost.dtype)))
            lost, counted = self.trainer.strategy.reduce(sums, reduce_op="sum")
            self.step_loss = lost / torch.where(counted > 0, counted, 1.0)
        if self.at_log_point and self.step_loss is not None:
            self.log("train/loss", self.step_loss)
            self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
            self.log("train/gradient_norm", total_norm(gradients(self)))
        self._lost.zero_()
        self._counted.zero_()
        self._micro_batches = 0
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
            if (shown := getattr(callback, "on_gradient", None)) is not None:
                shown(self.trainer, self)

    def _weigh_gradient(self) -> None:
        """Make it that of the mean over the step's labels, with whichever micro-batch and on whichever rank they came.

        It is their sum, by the positions of ``accumulate_grad_batches`` micro-batches on each rank. There are fewer
        labels where batches are filled up, and fewer micro-batches where an epoch ends.
        """
        own = self._counted.to(torch.float32, copy=True)  # what is given is summed in place
        labels = self.trainer.strategy.reduce(own, reduce_op="sum")
        positions = self._positions * self.trainer.accumulate_grad_batches * self.trainer.world_size
        torch._foreach_mul_(
            [own_part(gradient) for gradient in gradients(self)], positions / torch.where(labels > 0, labels, 1.0)
        )

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor] | None:
        """Measure the batch."""
        lost = self.measure(batch)
        return None if lost is None else {"lost": lost}

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure the batch."""
        self.measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured of all that is validated on."""
        self.log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log what was measured of all that is tested on."""
        self.log_metrics("test")

    def figures(self) -> dict[str, Tensor]:
        """What was measured, by name: scalars."""
        found: dict[str, Tensor] = self.metrics.compute()
        return found

    def log_metrics(self, side: str) -> None:
        """Log the figures as ``side/name``, and begin anew."""
        for name, value in self.figures().items():
            self.log(f"{side}/{name}", value, sync_dist=True)
        self.metrics.reset()
