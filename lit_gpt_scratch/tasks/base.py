"""What every task does so that a run that was killed goes on as if it had not been."""

import os
import random
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lit_gpt_scratch.batch import Layout
from lit_gpt_scratch.checkpoint.progress import LAYOUT, deal_out, settle
from lit_gpt_scratch.optim.average import MovingAverage
from lit_gpt_scratch.optim.parts import clip_norm, clip_value, gradients, total_norm


class Judge(Protocol):
    """Who says whether a step that is computed is done."""

    def __call__(self, loss: Tensor | None, norm: Tensor) -> bool:
        """Asked on every rank, with the same numbers, when the gradient has been clipped.

        Args:
            loss: Of the step, a scalar; None of a task that does not know it.
            norm: Of its gradient before it was clipped, a scalar.
        """


class Task(L.LightningModule):
    """A LightningModule whose runs can be resumed bit for bit, from a checkpoint of any moment.

    Lightning restores weights, optimizer, schedule and counters. Here is the rest: random numbers are a function of
    the seed, the batch and the rank, with no state to lose, and the counters are settled before they are restored.
    Which data comes next is the data module's to know. Where other processes go on, or with other micro-batches, the
    windows are the same, and the random numbers are not.

    Args:
        ema_decay: Of a moving average of the weights, which validates, writes samples, is what a checkpoint's weights
            are, and stays in place after the run; by default there is none.
    """

    def __init__(self, ema_decay: float | None = None) -> None:
        super().__init__()
        self.average = MovingAverage(ema_decay)
        self.judge: Judge | None = None
        """Without one every step is done. A step that is refused counts, but changes neither weights nor averages nor
        what the optimizer remembers."""
        self.step_loss: Tensor | None = None
        """Of the step whose gradient is at hand, over all ranks, where a judge asks for it."""

    @property
    def layout(self) -> Layout | None:
        """How the data module deals out a step; None if it does not say."""
        return getattr(getattr(self.trainer, "datamodule", None), "layout", None)

    def setup(self, stage: str) -> None:
        """Begin with the weights as they are, whatever an earlier run left in them."""
        if stage == "fit":
            self.average.in_use = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the counts of batches mean, and save the average of the weights in their place.

        Lightning asks for nothing after this.
        """
        if self.layout is not None:
            checkpoint[LAYOUT] = self.layout._asdict()
        self.average.save(checkpoint, self.trainer.optimizers, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Settle how far the run has come, in batches as they are here; the trainer restores it next."""
        if "loops" in checkpoint:
            settle(checkpoint["loops"]["fit_loop"])
            if self.layout is not None and LAYOUT in checkpoint:
                deal_out(checkpoint["loops"]["fit_loop"], Layout(**checkpoint[LAYOUT]), self.layout)
        if self.trainer.state.fn == "fit":
            self.average.load(checkpoint)

    def on_train_start(self) -> None:
        """Train the weights themselves; in a checkpoint their average was in their place."""
        self._use_average(False)

    def on_train_end(self) -> None:
        """Leave the average in the weights' place."""
        self._use_average(True)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer's flags say, under every strategy: the norm is that of the whole gradient.

        This is the last moment before the step, and so the judge's.
        """
        found = gradients(self)
        by_norm = gradient_clip_val and gradient_clip_algorithm != "value"
        norm = total_norm(found) if self.judge is not None and not by_norm else None
        if gradient_clip_val and by_norm:
            norm = clip_norm(found, gradient_clip_val)
        elif gradient_clip_val:
            clip_value(found, gradient_clip_val)
        if self.judge is not None and norm is not None and not self.judge(self.step_loss, norm):
            optimizer.zero_grad(set_to_none=True)  # what has no gradient, no optimizer touches

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw this batch's random numbers from its place in the run."""
        loop = self.trainer.fit_loop.epoch_loop
        # Lightning numbers log points by a count of its own, which a resumed run begins one off.
        loop._batches_that_stepped = self.trainer.global_step
        self._seed(loop.total_batch_idx, "train")

    def on_validation_start(self) -> None:
        """The same for a validation, so that one that is done again after a kill gives the same."""
        self._seed(self.trainer.fit_loop.epoch_loop.total_batch_idx, "validation")
        self._use_average(True)

    def on_validation_end(self) -> None:
        """Go on with the weights themselves; callbacks have had their turn."""
        self._use_average(False)

    def _use_average(self, wanted: bool) -> None:
        if self.trainer.state.fn == "fit":
            self.average.use(wanted, self.trainer.optimizers, self)

    def _seed(self, batch: int, purpose: str) -> None:
        run = int(os.environ.get("PL_GLOBAL_SEED", 0))
        shard = self.trainer.distributed_sampler_kwargs or {"rank": 0}  # ranks that share their data draw alike
        key = (run, batch + 1, shard["rank"], len(purpose))
        drawn = np.random.SeedSequence(key).generate_state(3)
        if self.device.type == "cpu":  # the other formats a stack trace for each kind of device that is not there
            torch.default_generator.manual_seed(int(drawn[0]))
        else:
            torch.manual_seed(int(drawn[0]))
        random.seed(int(drawn[1]))
        np.random.seed(int(drawn[2]))  # noqa: NPY002 - what a user's own part may draw from
