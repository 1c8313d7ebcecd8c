"""The progress bar, and how numbers are formatted in the terminal."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

from lit_gpt_scratch.callbacks.throughput import Throughput
from lit_gpt_scratch.tasks.gpt_module import GPTModule


def format_count(number: float) -> str:
    """A number of things in three digits: 2.16 M."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def pluralize(number: float, thing: str) -> str:
    """1 step, 1,000 steps."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def format_bytes(n_bytes: float) -> str:
    """A number of bytes in three digits: 126 MB."""
    return f"{format_count(n_bytes)}B" if n_bytes >= 1000 else f"{n_bytes:.0f} B"


def format_duration(seconds: float) -> str:
    """1:24, or 2:03:04 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_metrics(metrics: Mapping[str, Tensor], side: str) -> str:
    """What was measured on a side, the loss first: val/loss 1.234, val/accuracy 0.970."""
    names = sorted((n for n in metrics if n.startswith(f"{side}/")), key=lambda name: not name.endswith("/loss"))
    return ", ".join(f"{name} {metrics[name]:.{2 if name.endswith('perplexity') else 3}f}" for name in names)


log = logging.getLogger(__name__)

LOG_EVERY_N_STEPS = 100
"""Steps between two lines where neither a terminal nor the length of the run is known."""


class RunProgressBar(ProgressBar):
    """One bar over the whole run with loss, tokens per second and time left; validations as lines above it.

    Where standard error is no terminal (a log file, CI), a line at every tenth of the run instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._enabled = True
        self._began = 0.0

    def disable(self) -> None:
        """Lightning's switch for ranks that should stay quiet."""
        self._enabled = False

    def enable(self) -> None:
        """The opposite of ``disable``."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the step where the run stands."""
        total = trainer.estimated_stepping_batches
        self._total = None if total == float("inf") else int(total)
        self._began = time.perf_counter()
        self._first_step = self._step = trainer.global_step
        self._shown_tenth = 10 * self._step // self._total if self._total else 0
        if self._enabled and not trainer.global_step:
            compiles = isinstance(pl_module, GPTModule) and pl_module.compiled
            log.info("first step%s", " (compiling, this once)" if compiles else "")
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total,
                initial=trainer.global_step,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.1,
                leave=True,
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move on when a step is done; figures are read at log points, because reading waits for the device."""
        step = trainer.global_step
        if not self._enabled or step == self._step:
            return
        self._step = step
        if step == self._first_step + 1:
            self._began = time.perf_counter()  # what is left will not be compiled again
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
        if self._bar is not None:
            if step == 1 or (every and step % every == 0):
                self._bar.set_postfix_str(self._figures(trainer), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._total is None:
            if step % LOG_EVERY_N_STEPS == 0:
                log.info("step %d, %s", step, self._figures(trainer))
        elif (tenth := 10 * step // self._total) > self._shown_tenth:
            self._shown_tenth = tenth
            since_compiled = max(step - self._first_step - 1, 1)
            left = (self._total - step) * (time.perf_counter() - self._began) / since_compiled
            log.info("step %d of %d, %s, %.0f s left", step, self._total, self._figures(trainer), left)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A line with the validation's figures."""
        metrics = trainer.callback_metrics
        if self._enabled and not trainer.sanity_checking and "val/loss" in metrics:
            line = f"step {trainer.global_step}: {format_metrics(metrics, 'val')}"
            if self._bar is None:
                log.info(line)
            else:
                self.print(line)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar before anything is said about the exception."""
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _figures(self, trainer: L.Trainer) -> str:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
        speed = max((c.tokens_per_second for c in callbacks if isinstance(c, Throughput)), default=0.0)
        loss = trainer.callback_metrics.get("train/loss")
        parts = [] if loss is None else [f"loss {loss:.3f}"]
        if speed:  # known from the first log point on
            parts.append(f"{speed:,.0f} tokens/s")
        return ", ".join(parts)
