"""Progress bar and number formatting for the terminal."""

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
from lit_gpt_scratch.lightning_compat import planned_steps

log = logging.getLogger(__name__)

LOG_EVERY_N_STEPS = 100
"""Number of steps between progress lines if standard error is not a terminal and the run length is unknown."""


class RunProgressBar(ProgressBar):
    """Progress bar for the whole run that shows the training loss, tokens per second and remaining time.

    Validation metrics are printed above the bar. If standard error is not a terminal (e.g. a log file or CI), a line is
    logged after every tenth of the run instead.

    The training loss is read only at the steps at which it is logged, because reading it synchronizes the device. At
    other steps, the last logged loss is shown with its step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: Any = None
        self._enabled = True
        self._started = 0.0
        self._loss_step: int | None = None
        """Step of the last logged training loss, or None if the task logs it at every step."""

    def disable(self) -> None:
        """Disable all output; Lightning calls this on ranks other than 0."""
        self._enabled = False

    def enable(self) -> None:
        """Enable output again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar, starting at the current step."""
        total = planned_steps(trainer)
        self._total = None if total == float("inf") else int(total)
        self._started = time.perf_counter()
        self._first_step = self._step = trainer.global_step
        self._loss_step = self._step if hasattr(type(pl_module), "is_log_step") else None
        self._shown_tenth = 10 * self._step // self._total if self._total else 0
        if self._enabled and not trainer.global_step:
            log.info("first step%s", " (compiling once)" if getattr(pl_module, "compiled", False) else "")
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
        """Advance the bar after an optimizer step."""
        step = trainer.global_step
        if not self._enabled or step == self._step:
            return
        self._step = step
        if step == self._first_step + 1:
            self._started = time.perf_counter()  # exclude the first step, which compiles
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
        is_logged = step == 1 or (bool(every) and step % every == 0)
        if is_logged and self._loss_step is not None:
            self._loss_step = step
        if self._bar is not None:
            if is_logged:
                self._bar.set_postfix_str(self._status(trainer, name_step=True), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._total is None:
            if step % LOG_EVERY_N_STEPS == 0:
                log.info("step %d, %s", step, self._status(trainer))
        elif (tenth := 10 * step // self._total) > self._shown_tenth:
            self._shown_tenth = tenth
            timed_steps = max(step - self._first_step - 1, 1)
            left = (self._total - step) * (time.perf_counter() - self._started) / timed_steps
            log.info("step %d of %d, %s, %.0f s left", step, self._total, self._status(trainer), left)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the validation metrics on one line."""
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
        """Close the bar before the exception is printed."""
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print text above the bar."""
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _status(self, trainer: L.Trainer, name_step: bool = False) -> str:
        """Format the training loss and speed; add the step of the loss if it is not current or ``name_step`` is set."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
        speed = max((c.tokens_per_second for c in callbacks if isinstance(c, Throughput)), default=0.0)
        parts = []
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            is_current = self._loss_step in (None, self._step) and not (name_step and self._loss_step)
            parts.append(f"loss {loss:.3f}" + ("" if is_current else f" at step {self._loss_step}"))
        if speed:  # not known before it is first logged
            parts.append(f"{speed:,.0f} tokens/s")
        return ", ".join(parts)


def format_count(number: float) -> str:
    """Format a count with three significant digits, e.g. "2.16 M"."""
    number = float(f"{number:.3g}")  # before the unit is chosen: 999,600 is 1 M, not 1e+03 k
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def pluralize(number: float, thing: str) -> str:
    """Format a count with its noun in the singular or plural, e.g. "1 step" or "1,000 steps"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def format_bytes(n_bytes: float) -> str:
    """Format a size in bytes with three significant digits, e.g. "126 MB"."""
    return f"{format_count(n_bytes)}B" if n_bytes >= 1000 else f"{n_bytes:.0f} B"


def format_duration(seconds: float) -> str:
    """Format a duration as minutes and seconds ("1:24"), with hours if it is an hour or longer ("2:03:04")."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_metrics(metrics: Mapping[str, Tensor], split: str) -> str:
    """Format the metrics of a split ("val", "test"), loss first, e.g. "val/loss 1.234, val/accuracy 0.970"."""
    names = sorted((n for n in metrics if n.startswith(f"{split}/")), key=lambda name: not name.endswith("/loss"))
    return ", ".join(f"{name} {metrics[name]:.{2 if name.endswith('perplexity') else 3}f}" for name in names)
