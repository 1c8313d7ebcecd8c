"""Training throughput: tokens per second, time per phase, model FLOPs utilization (MFU), and peak memory."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from torch import Tensor

from lit_gpt_scratch.batch_types import Batch
from lit_gpt_scratch.callbacks.checkpointing import HostReducer
from lit_gpt_scratch.callbacks.metric_logging import log_metrics
from lit_gpt_scratch.checkpoint.training_state import validate_callback_state
from lit_gpt_scratch.lightning_compat import FETCH_BATCH_ACTION, collective_timeout
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.profiling.flops_and_memory import training_flops_per_token
from lit_gpt_scratch.profiling.peak_flops import peak_flops
from lit_gpt_scratch.profiling.peak_memory import peak_memory

STEP_PHASES = ("data", "generation", "forward", "backward", "optimizer", "rest")
"""Phases of a step: waiting for data, generating rollouts, forward pass, backward pass, optimizer, and the rest."""
TIME_SHARE_TAGS = tuple(f"throughput/{phase}" for phase in STEP_PHASES)
"""TensorBoard tags for the fraction of step time that each phase takes."""


FIRST_STEPS = 8
"""Number of steps that are timed to compute the median step time. The first step, which compiles, is excluded."""


@runtime_checkable
class GeneratesBatches(Protocol):
    """Protocol for tasks that generate their own training data, such as RL policies."""

    def take_generation_seconds(self) -> float:
        """Return the time in seconds spent generating and scoring replies since the last call."""


class Throughput(Callback):
    """Callback that logs training speed and its bottlenecks every ``trainer.log_every_n_steps`` steps.

    - ``tokens``: number of training tokens so far across all ranks, including padding.
    - ``tokens_per_second``: training tokens per second since the previous logged value.
    - ``throughput/data``, ``/generation``, ``/forward``, ``/backward``, ``/optimizer``, ``/rest``: fraction of the step
      time that each phase takes on rank 0; the fractions add up to 1. ``data`` is the time spent waiting for the next
      batch, ``generation`` the time spent generating and scoring replies in RL, ``optimizer`` the time from the end
      of the backward pass to the end of the step (clipping, update, schedule), and ``rest`` the time spent in callbacks
      and loggers between steps. On a GPU, these are fractions of device time, so waiting for data while the device is
      busy does not count. They are not logged on other accelerators, whose timers cannot be read without
      synchronizing the device.
    - ``throughput/model_flops_utilisation``: achieved FLOP/s divided by peak FLOP/s. A token takes ``6N + 12LdT`` FLOPs
      for rows of T tokens (see ``training_flops_per_token``). The peak is the data sheet's FLOP/s for dense matmuls on
      this GPU in this precision or, if it is unknown, the FLOP/s of a matmul measured at the start (see
      ``peak_flops``). Logged only for tasks whose ``net`` is a ``GPT``.
    - ``throughput/peak_memory_gigabytes``: maximum across all ranks, including validation; see ``peak_memory``.

    Only training is timed; validation, sampling, checkpointing and the first step, which compiles, are excluded. The
    device is synchronized only at the end of training and, if ``on_first_steps`` is set, after each of the first
    steps.
    """

    def __init__(self) -> None:
        self.tokens = 0
        """Number of training tokens in the whole run, across all ranks."""
        self.seconds = 0.0
        """Training time of this session in seconds, in which ``timed_tokens`` were processed."""
        self.timed_tokens = 0
        self.tokens_per_second = 0.0
        self.peaks: dict[str, float] = {}
        """Total peak FLOP/s of all devices, keyed by kind: ``nominal`` (if known) and ``measured``."""
        self.on_first_steps: Callable[[], None] | None = None
        """Function called once, after the first steps have been timed; must be set at the start of training."""
        self._step_seconds: list[float] = []
        self._step_started: float | None = None
        self._phase_seconds = dict.fromkeys(STEP_PHASES, 0.0)
        self._memory: float | None = None
        self.flops_per_token = 0
        """FLOPs per training token at full context length, or 0 if the task's ``net`` is not a ``GPT``."""
        self.flops = 0
        """FLOPs of the ``timed_tokens``, as counted by ``training_flops_per_token``."""
        self._flops_at_length: Callable[[int], int] | None = None
        self._timer = StepTimer(torch.device("cpu"))
        self._loader_timer = DataLoaderTimer(PassThroughProfiler())
        self._batch_started = 0.0
        self._is_warm = False
        self._step = 0
        self._window_tokens = self._window_flops = 0
        self._window_seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the peak FLOP/s and reset the timers; the first step of this process compiles, so it is not timed."""
        self._step_seconds, self._step_started = [], None
        self._is_warm, self._step = False, trainer.global_step
        self._timer = StepTimer(pl_module.device)
        self._reducer = HostReducer(collective_timeout(trainer))
        self._loader_timer = DataLoaderTimer(trainer.profiler)  # type: ignore[attr-defined]  # the trainer sets it late
        trainer.profiler = self._loader_timer  # type: ignore[attr-defined]  # the trainer sets it late
        net = getattr(pl_module, "net", None)
        if isinstance(net, GPT):
            self.flops_per_token = training_flops_per_token(net)
            self._flops_at_length = cache(partial(training_flops_per_token, net))
            peaks = peak_flops(pl_module.device, matmul_dtype(trainer, pl_module))
            self.peaks = {kind: trainer.world_size * flops for kind, flops in peaks.items()}
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)  # excludes the matmuls measured above

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Mark the end of the ``rest`` phase, or start the timer if it is stopped, e.g. after validation."""
        waited = {"data": self._loader_timer.take()}
        if isinstance(pl_module, GeneratesBatches):
            waited["generation"] = pl_module.take_generation_seconds()
        if self._timer.running:
            self._timer.mark("rest", waited)
        elif self._is_warm:
            self._batch_started = time.perf_counter()
            self._timer.start()
        if self.on_first_steps is not None and self._step_started is None:
            self._step_started = time.perf_counter()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Mark the end of the forward pass."""
        self._timer.mark("forward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mark the end of the backward pass."""
        self._timer.mark("backward")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the tokens of the batch, and log the throughput every ``trainer.log_every_n_steps`` steps."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        sampler = trainer.distributed_sampler_kwargs or {"num_replicas": 1}  # tensor-parallel ranks share a batch
        tokens = batch["input_ids"].numel() * sampler["num_replicas"]
        self.tokens += tokens
        self._timer.mark("optimizer" if stepped else "rest")
        if self._timer.running:
            now = time.perf_counter()
            self._window_tokens += tokens
            if self._flops_at_length is not None:
                self._window_flops += tokens * self._flops_at_length(batch["input_ids"].shape[-1])
            self._window_seconds += now - self._batch_started
            self._batch_started = now
        self._is_warm = self._is_warm or stepped
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
        if stepped and every and trainer.global_step % every == 0:
            self._log(trainer, pl_module)
        if stepped and self.on_first_steps is not None:
            self._time_first_step(pl_module.device, self.on_first_steps)

    def _time_first_step(self, device: torch.device, report: Callable[[], None]) -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # only these few steps are synchronized
        self._step_seconds.append(time.perf_counter() - (self._step_started or 0.0))
        self._step_started = None
        if len(self._step_seconds) == 1 + FIRST_STEPS:
            self.on_first_steps = None
            report()

    @property
    def median_step_seconds(self) -> float | None:
        """Median duration of the first few steps in seconds, excluding the first, or None before two steps end."""
        return statistics.median(self._step_seconds[1:]) if len(self._step_seconds) > 1 else None

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        phases = self._timer.take()
        counts, figures = {"tokens": float(self.tokens)}, time_shares(phases)
        if (flops_per_second := self._close_window(phases)) is not None:
            counts["tokens_per_second"] = self.tokens_per_second
            utilization = list(self.utilization(flops_per_second).values())
            figures |= {"model_flops_utilisation": utilization[0]} if utilization else {}
        memory = self._peak_gigabytes(pl_module.device)
        figures |= {} if memory is None else {"peak_memory_gigabytes": memory}
        log_metrics(trainer, counts | {f"throughput/{name}": value for name, value in figures.items()}, self._step - 1)

    @property
    def mean(self) -> float | None:
        """Mean training speed of this session in tokens per second, or None if no step has been timed yet."""
        return self.timed_tokens / self.seconds if self.seconds else None

    def utilization(self, flops_per_second: float) -> dict[str, float]:
        """Return the model FLOPs utilization at the given speed relative to each peak FLOP/s in ``peaks``."""
        return {kind: flops_per_second / peak for kind, peak in self.peaks.items()}

    @property
    def figures(self) -> dict[str, Any]:
        """Throughput metrics of this session: time fraction per phase, utilization, peak TFLOP/s and peak memory."""
        return {
            **time_shares(self._phase_seconds),
            "model_flops_utilisation": self.utilization(self.flops / self.seconds) if self.seconds else {},
            "peak_teraflops": {kind: peak / 1e12 for kind, peak in self.peaks.items()},
            "peak_memory_gigabytes": self._memory,
        }

    def _close_window(self, phases: dict[str, float]) -> float | None:
        """Add the time since the last call to the totals and update the speed.

        Returns:
            FLOP/s since the last call, or None if no step was timed.
        """
        for phase, seconds in phases.items():
            self._phase_seconds[phase] += seconds
        if not self._window_seconds:
            return None
        self.timed_tokens += self._window_tokens
        self.flops += self._window_flops
        self.seconds += self._window_seconds
        self.tokens_per_second = self._window_tokens / self._window_seconds
        flops_per_second = self._window_flops / self._window_seconds
        self._window_tokens, self._window_flops, self._window_seconds = 0, 0, 0.0
        return flops_per_second

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the steps that have not been logged yet to the totals, and restore the user's profiler."""
        trainer.profiler = self._loader_timer.profiler  # type: ignore[attr-defined]  # the trainer sets it late
        self._close_window(self._timer.finish())
        self._memory = self._peak_gigabytes(pl_module.device)

    def _peak_gigabytes(self, device: torch.device) -> float | None:
        memory = peak_memory(device)
        return None if memory is None else self._reducer.max(memory) / 1e9

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the timer."""
        self._timer.stop()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the timer."""
        self._timer.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of training tokens so far; a resumed run continues the count."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of training tokens."""
        self.tokens = validate_callback_state(state_dict, dict[str, int], self.state_key).get("tokens", 0)


def time_shares(seconds: dict[str, float]) -> dict[str, float]:
    """Return the fraction of the total time that each phase takes, or an empty dict if the total is 0."""
    total = sum(seconds.values())
    return {phase: part / total for phase, part in seconds.items()} if total else {}


def matmul_dtype(trainer: L.Trainer, pl_module: L.LightningModule) -> torch.dtype:
    """Return the dtype of matmuls in training: the autocast dtype or, without autocast, the dtype of the weights."""
    weight = torch.ones(1, 1, dtype=next(pl_module.parameters()).dtype, device=pl_module.device)
    with trainer.precision_plugin.train_step_context():
        return (weight @ weight).dtype


class DataLoaderTimer:
    """Profiler that times batch fetching and forwards all calls to another profiler.

    Args:
        profiler: The user's profiler, to which all calls are forwarded.
    """

    def __init__(self, profiler: Profiler) -> None:
        self.profiler = profiler
        self.profile = profiler.profile  # called around every hook of every callback, so bypass __getattr__
        self._started = self._seconds = 0.0

    def start(self, action_name: str) -> None:
        """Start timing if the action fetches a batch."""
        self.profiler.start(action_name)
        if action_name == FETCH_BATCH_ACTION:
            self._started = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Stop timing if the action fetches a batch."""
        if action_name == FETCH_BATCH_ACTION:
            self._seconds += time.perf_counter() - self._started
        self.profiler.stop(action_name)

    def take(self) -> float:
        """Return the time in seconds spent fetching batches since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.profiler, name)


COLLECT_EVERY = 32
"""Number of timer events to collect before reading them together.

Reading them one by one takes twice as long because of cold CPU caches.
"""


class TimerEvent(Protocol):
    """Protocol for timer events with the interface of ``torch.cuda.Event``."""

    def record(self) -> Any:
        """Record the event; on an accelerator, it completes once all previously submitted work has completed."""

    def query(self) -> bool:
        """Return whether the event has completed."""

    def synchronize(self) -> None:
        """Wait for the event to complete."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the time in milliseconds from this event to ``end_event``."""


class HostTimerEvent:
    """Timer event that uses the clock of the host."""

    def record(self) -> None:
        """Record the current time."""
        self._at = time.perf_counter()

    def query(self) -> bool:
        """Return True, because an event on the host completes when it is recorded."""
        return True

    def synchronize(self) -> None:
        """Do nothing, because an event on the host completes when it is recorded."""

    def elapsed_time(self, end_event: "HostTimerEvent") -> float:
        """Return the time in milliseconds from this event to ``end_event``."""
        return 1000 * (end_event._at - self._at)


# MPS is omitted, because reading the time between two of its events waits for the device.
EVENT_TYPES: dict[str, Callable[[], TimerEvent]] = {
    "cpu": HostTimerEvent,
    "cuda": partial(torch.cuda.Event, enable_timing=True),
}


class StepTimer:
    """Timer that accumulates the time spent in each phase of a step; each mark ends a phase.

    On an accelerator, marks are events in its stream. Recording an event takes almost no time on the host, and the time
    between two events is counted once the device has completed both. Only ``finish`` waits for the device.

    Args:
        device: Device that runs the steps. No times are recorded on devices without an entry in ``EVENT_TYPES``.
    """

    def __init__(self, device: torch.device) -> None:
        self.running = False
        self._event = EVENT_TYPES.get(device.type)
        self._marks: deque[tuple[str | None, Mapping[str, float], TimerEvent]] = deque()
        self._last: TimerEvent | None = None
        self._seconds = dict.fromkeys(STEP_PHASES, 0.0)

    def start(self) -> None:
        """Start timing."""
        self.running = True
        self._record(None, {})

    def stop(self) -> None:
        """Stop timing and discard the time since the last mark."""
        self.running = False

    def mark(self, phase: str, waits: Mapping[str, float] | None = None) -> None:
        """Add the time since the last mark to ``phase``; does nothing while the timer is stopped.

        Args:
            phase: The phase that ends, one of ``STEP_PHASES``.
            waits: Seconds that are added to other phases instead, keyed by phase, e.g. the time that the host waited
                for data. Their sum is limited to the time since the last mark, because an accelerator with pending work
                waits for less time than the host.
        """
        if self.running:
            self._record(phase, waits or {})

    def take(self) -> dict[str, float]:
        """Return the seconds per phase since the last call, up to the last completed event, and reset them."""
        self._collect()
        taken, self._seconds = self._seconds, dict.fromkeys(STEP_PHASES, 0.0)
        return taken

    def finish(self) -> dict[str, float]:
        """Stop timing, wait for the device, and return the remaining seconds per phase."""
        self.stop()
        if self._marks:
            self._marks[-1][2].synchronize()
        return self.take()

    def _record(self, phase: str | None, waits: Mapping[str, float]) -> None:
        if self._event is None:
            return
        event = self._event()
        event.record()
        self._marks.append((phase, waits, event))
        if len(self._marks) > COLLECT_EVERY:  # so that marks do not accumulate without limit in a run that never logs
            self._collect()

    def _collect(self) -> None:
        while self._marks and self._marks[0][2].query():
            phase, waits, event = self._marks.popleft()
            if phase is not None and self._last is not None:
                seconds = self._last.elapsed_time(event) / 1000
                for other, wait in waits.items():
                    taken = min(wait, seconds)
                    self._seconds[other] += taken
                    seconds -= taken
                self._seconds[phase] += seconds
            self._last = event
