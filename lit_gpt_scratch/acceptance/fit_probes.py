"""Callbacks that acceptance rows add to ``fit``: the cost of all other callbacks, and the time to a validation loss."""

import json
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from typing_extensions import override

from lit_gpt_scratch.acceptance.live_values import report
from lit_gpt_scratch.acceptance.profiler_trace import STEP_MARK
from lit_gpt_scratch.acceptance.row import Values, synchronize
from lit_gpt_scratch.callbacks.checkpointing import RunDirCallback
from lit_gpt_scratch.callbacks.metric_logging import MetricTap
from lit_gpt_scratch.tasks.gpt_module import GPTModule

MS_PER_STEP: Final = ("ms per step", "ms per step without callbacks")
PROBE_FILE: Final = "probe.json"
LOGGED_VALUES: Final = {"tokens_per_second": "tokens/s", "train/loss": "train loss", "val/loss": "val loss"}
"""Metrics of ``fit`` that a row shows while ``fit`` is running, with the names of the values."""
TRACE_FILE: Final = "probe_trace.json.gz"


class FitProgress(L.Callback):
    """Callback that reports the progress at every logged step and after every validation, in case the row is stopped.

    The losses and the speed are those that were logged last, before the current step.
    """

    def __init__(self) -> None:
        self._began = 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 1 or trainer.global_step % _log_interval(trainer) == 0:
            self._report(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer)

    def _report(self, trainer: L.Trainer) -> None:
        logged = trainer.logged_metrics
        values: Values = {"steps": trainer.global_step, "training s": time.perf_counter() - self._began}
        report(values | {label: float(logged[name]) for name, label in LOGGED_VALUES.items() if name in logged})


class CallbackCost(RunDirCallback):
    """Callback that profiles and times steps with and without all other callbacks.

    It profiles some steps with the other callbacks and as many without, then times blocks of steps.

    It must be the first callback, so that its marks enclose the other callbacks; ``fit`` places the callbacks of
    ``--trainer.callbacks`` first. The trace is saved as ``TRACE_FILE`` and the times as ``PROBE_FILE`` in the run
    folder.

    Args:
        warmup: Number of steps before the profiled steps.
        profiled: Number of profiled steps with the other callbacks, and without.
        blocks: Number of timed blocks, half of them with the other callbacks; even.
        block_steps: Number of steps per block.
    """

    def __init__(self, warmup: int = 12, profiled: int = 10, blocks: int = 6, block_steps: int = 10) -> None:
        self.warmup, self.profiled = warmup, profiled
        self.blocks, self.block_steps = blocks, block_steps
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        """Seconds per step of each block, keyed by whether the other callbacks ran."""
        self._profiler: Any = None
        self._others: list[L.Callback] = []
        self._loggers: list[Any] = []
        self._step_filter: Any = None
        self._actions: Any = None
        self._began = 0.0

    @property
    def steps(self) -> int:
        """Number of steps of a run with this callback."""
        return self.warmup + 2 * self.profiled + self.blocks * self.block_steps + 1

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
        self._others = [callback for callback in callbacks if callback is not self]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step, without, last = trainer.global_step, self.warmup + self.profiled, self.warmup + 2 * self.profiled
        if step == self.warmup:
            self._loggers = list(trainer.loggers)
            self._step_filter = pl_module.step_filter if isinstance(pl_module, GPTModule) else None
            self._actions = AnnotatedActions(trainer)
            self._profiler = profile(activities=_activities(pl_module.device))
            self._profiler.start()
        if self.warmup < step == without:
            self._enable_others(trainer, pl_module, False)
        if self.warmup <= step <= last:
            with record_function(f"{STEP_MARK}{step}"):
                pass
        if step == last:
            self._profiler.stop()
            self._actions.remove()
            if self.folder is not None:
                self._profiler.export_chrome_trace(str(self.folder.path / TRACE_FILE))
            self._profiler = None
        if step >= last and (step - last) % self.block_steps == 0:
            self._start_block(trainer, pl_module, (step - last) // self.block_steps)

    def _start_block(self, trainer: L.Trainer, task: L.LightningModule, number: int) -> None:
        """Record the block that has ended, and enable or disable the other callbacks for the next block."""
        synchronize(task.device)
        now = time.perf_counter()
        if number > 0:
            self.seconds[self._runs_others(number - 1)].append((now - self._began) / self.block_steps)
            report({name: 1000 * seconds for name, seconds in self._medians(MS_PER_STEP).items()})
        self._enable_others(trainer, task, number >= self.blocks or self._runs_others(number))
        self._began = time.perf_counter()

    @staticmethod
    def _runs_others(number: int) -> bool:
        return number % 4 in (0, 3)  # with, without, without, with: a drift of the clock rate affects both equally

    def _enable_others(self, trainer: L.Trainer, task: L.LightningModule, enabled: bool) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
        callbacks[:] = [self, *self._others] if enabled else [self]  # in place: the trainer is iterating over the list
        if isinstance(task, GPTModule):
            task.step_filter = self._step_filter if enabled else None
        trainer.loggers = [logger for logger in self._loggers if enabled or not isinstance(logger, MetricTap)]

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._loggers:
            self._enable_others(trainer, pl_module, True)
        found = {"seconds_per_step": self._medians(("with", "without")), "log_every_n_steps": _log_interval(trainer)}
        _write(self, {**found, "first_step_without": self.warmup + self.profiled})

    def _medians(self, names: tuple[str, str]) -> dict[str, float]:
        """Return the median seconds per step with and without the other callbacks, under the given names."""
        times = zip(names, (self.seconds[True], self.seconds[False]), strict=True)
        return {name: statistics.median(seconds) for name, seconds in times if seconds}


class AnnotatedActions:
    """Annotates the trainer's actions, such as hooks of callbacks, in the trace of ``torch.profiler``.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._profiler: Any = trainer.profiler  # type: ignore[attr-defined]  # the trainer sets it late
        self._profile = self._profiler.profile
        self._profiler.profile = self._annotate

    def remove(self) -> None:
        """Restore the profiler of the trainer."""
        self._profiler.profile = self._profile

    @contextmanager
    def _annotate(self, name: str) -> Iterator[str]:
        # The arguments of a callback are omitted.
        with self._profile(name), record_function(re.sub(r"\{.*\}", "", name)):
            yield name


class TimeToLoss(RunDirCallback):
    """Callback that measures the training time until the validation loss reaches a target, and then stops the run.

    The clock stops during validation, sampling and saving at validations.

    Args:
        target: Validation loss in nats per token.
    """

    def __init__(self, target: float = 1.4697) -> None:
        self.target = target
        self.points: list[dict[str, float]] = []
        """Step, validation loss and training time in seconds of each validation."""
        self.seconds = 0.0
        self.first_step_seconds = 0.0
        self._since: float | None = None

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.first_step_seconds:
            self._stop_clock(pl_module.device)
            self.first_step_seconds = self.seconds

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_clock(pl_module.device)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics["val/loss"].item()
        self.points.append({"step": trainer.global_step, "loss": loss, "seconds": self.seconds})
        report({"training s": self.seconds, "steps": trainer.global_step, "val loss": loss})
        report({"loss by training s": ", ".join(f"{p['loss']:.4f} at {p['seconds']:.1f}" for p in self.points)})
        reached = loss <= self.target
        trainer.should_stop = trainer.should_stop or reached
        _write(
            self,
            {"reached": reached, "points": self.points, "first_step_seconds": self.first_step_seconds},
        )

    def _stop_clock(self, device: torch.device) -> None:
        if self._since is not None:
            synchronize(device)
            self.seconds += time.perf_counter() - self._since
            self._since = None


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _log_interval(trainer: L.Trainer) -> int:
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
    return interval


def _write(callback: RunDirCallback, content: dict[str, Any]) -> None:
    if callback.folder is not None:
        callback.folder.write_text(PROBE_FILE, json.dumps(content, indent=2) + "\n")
