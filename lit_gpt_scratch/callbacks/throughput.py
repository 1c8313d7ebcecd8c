"""Training throughput: tokens per second, shares of a step's time, model FLOP utilisation, peak memory."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from torch import Tensor

from lit_gpt_scratch.batch_types import Batch
from lit_gpt_scratch.callbacks.checkpointing import HostReducer
from lit_gpt_scratch.callbacks.metric_logging import log_metrics
from lit_gpt_scratch.lightning_compat import FETCH_BATCH_ACTION
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.profiling.flops_and_memory import training_flops_per_token
from lit_gpt_scratch.profiling.peak_flops import peak_flops
from lit_gpt_scratch.profiling.peak_memory import peak_memory

STEP_PHASES = ("data", "generation", "forward", "backward", "optimizer", "rest")
"""Phases of a step: waiting for the batch, generating rollouts, the three compute phases, and the rest."""
TIME_SHARE_TAGS = tuple(f"throughput/{phase}" for phase in STEP_PHASES)
"""Names of the time shares in TensorBoard."""


FIRST_STEPS = 8
"""Steps after the first, which compiles, whose median time ``Throughput`` measures on request."""


@runtime_checkable
class GeneratesBatches(Protocol):
    """A task that generates what it learns from, such as an RL policy."""

    def take_generation_seconds(self) -> float:
        """Seconds spent on generating and scoring since the last call."""


class Throughput(Callback):
    """Logs at log points how fast training is, and what limits it.

    - ``tokens``: seen in training so far, over all ranks; padding counts.
    - ``tokens_per_second``: since the last log point.
    - ``throughput/data``, ``/generation``, ``/forward``, ``/backward``, ``/optimizer``, ``/rest``: shares of a step's
      time on rank 0, which add up to 1. ``data`` is waiting for the next batch; ``generation`` is generating and
      scoring replies, for a policy that learns from its own; ``optimizer`` lasts from the end of the backward pass to
      the end of the step: clipping, update, schedule; ``rest`` is callbacks and loggers between steps.
      On a GPU these are shares of device time: waiting for data while the device was busy does not count.
      Other accelerators have none, because their timers cannot be read without a synchronization.
    - ``throughput/model_flops_utilisation``: achieved FLOP/s over peak FLOP/s. A token takes ``6N + 12LdT`` operations
      (``training_flops_per_token``). The peak is the data sheet's dense figure for this GPU and precision, or, where
      that is not known, that of a matrix product measured here (``peak_flops``). Only for tasks whose ``net`` is a GPT.
    - ``throughput/peak_memory_gigabytes``: the maximum over ranks, validations included; see ``peak_memory``.

    Only training is timed: not validation, sampling and checkpointing, nor the first step, which compiles. The device
    is synchronized only at the end of training, and at the end of the first steps if ``on_first_steps`` is set.
    """

    def __init__(self) -> None:
        self.tokens = 0
        """Training tokens over all ranks, of the whole run."""
        self.seconds = 0.0
        """Training seconds in which ``timed_tokens`` were processed, of this session."""
        self.timed_tokens = 0
        self.tokens_per_second = 0.0
        self.peaks: dict[str, float] = {}
        """Peak FLOP/s of all devices together: ``nominal``, if it is known, and ``measured``."""
        self.on_first_steps: Callable[[], None] | None = None
        """To be set when training starts, by whoever needs ``median_step_seconds``: called once, after these steps."""
        self._step_seconds: list[float] = []
        self._step_started: float | None = None
        self._phase_seconds = dict.fromkeys(STEP_PHASES, 0.0)
        self._memory: float | None = None
        self._flops_per_token = 0
        self._timer = StepTimer(torch.device("cpu"))
        self._loader_timer = DataLoaderTimer(PassThroughProfiler())
        self._batch_started = 0.0
        self._is_warm = False
        self._step = 0
        self._window_tokens = 0
        self._window_seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the devices' peak; the first step of this process compiles and is not timed."""
        self._step_seconds, self._step_started = [], None
        self._is_warm, self._step = False, trainer.global_step
        self._timer = StepTimer(pl_module.device)
        self._reducer = HostReducer()
        self._loader_timer = DataLoaderTimer(trainer.profiler)  # type: ignore[attr-defined]  # the trainer sets it late
        trainer.profiler = self._loader_timer  # type: ignore[attr-defined]  # the same
        net = getattr(pl_module, "net", None)
        if isinstance(net, GPT):
            self._flops_per_token = training_flops_per_token(net)
            peaks = peak_flops(pl_module.device, matmul_dtype(trainer, pl_module))
            self.peaks = {kind: trainer.world_size * flops for kind, flops in peaks.items()}
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)  # the matrix products above are not the run's

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the timer where validation or the start of the run had stopped it."""
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
        """The forward pass is done."""
        self._timer.mark("forward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The backward pass is done."""
        self._timer.mark("backward")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch, and log at log points."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        sampler = trainer.distributed_sampler_kwargs or {"num_replicas": 1}  # tensor-parallel ranks share a batch
        tokens = batch["input_ids"].numel() * sampler["num_replicas"]
        self.tokens += tokens
        self._timer.mark("optimizer" if stepped else "rest")
        if self._timer.running:
            now = time.perf_counter()
            self._window_tokens += tokens
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
        """Median time of the first steps, without the very first; None before the second step."""
        return statistics.median(self._step_seconds[1:]) if len(self._step_seconds) > 1 else None

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        phases = self._timer.take()
        counts, figures = {"tokens": float(self.tokens)}, time_shares(phases)
        if self._close_window(phases):
            counts["tokens_per_second"] = self.tokens_per_second
            utilisation = list(self.utilisation(self.tokens_per_second).values())
            figures |= {"model_flops_utilisation": utilisation[0]} if utilisation else {}
        memory = self._peak_gigabytes(pl_module.device)
        figures |= {} if memory is None else {"peak_memory_gigabytes": memory}
        log_metrics(trainer, counts | {f"throughput/{name}": value for name, value in figures.items()}, self._step - 1)

    @property
    def mean(self) -> float | None:
        """Training tokens per second of this session, or None before anything was timed."""
        return self.timed_tokens / self.seconds if self.seconds else None

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOP utilisation at this speed, relative to each of the ``peaks``."""
        return {kind: tokens_per_second * self._flops_per_token / peak for kind, peak in self.peaks.items()}

    @property
    def figures(self) -> dict[str, Any]:
        """This session's means: time shares, utilisation of each peak, the peaks in TFLOP/s, and peak memory."""
        return {
            **time_shares(self._phase_seconds),
            "model_flops_utilisation": self.utilisation(self.mean) if self.mean else {},
            "peak_teraflops": {kind: peak / 1e12 for kind, peak in self.peaks.items()},
            "peak_memory_gigabytes": self._memory,
        }

    def _close_window(self, phases: dict[str, float]) -> bool:
        """Add up the window since the last call and set the speed; False if nothing was timed."""
        for phase, seconds in phases.items():
            self._phase_seconds[phase] += seconds
        if not self._window_seconds:
            return False
        self.timed_tokens += self._window_tokens
        self.seconds += self._window_seconds
        self.tokens_per_second = self._window_tokens / self._window_seconds
        self._window_tokens, self._window_seconds = 0, 0.0
        return True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count what came after the last log point."""
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
        """The token count, which a resumed run continues."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the token count."""
        self.tokens = state_dict["tokens"]


def time_shares(seconds: dict[str, float]) -> dict[str, float]:
    """Each phase's share of the total; empty if the total is 0."""
    total = sum(seconds.values())
    return {phase: part / total for phase, part in seconds.items()} if total else {}


def matmul_dtype(trainer: L.Trainer, pl_module: L.LightningModule) -> torch.dtype:
    """Dtype of matrix products in training: that of the weights, or autocast's."""
    weight = torch.ones(1, 1, dtype=next(pl_module.parameters()).dtype, device=pl_module.device)
    with trainer.precision_plugin.train_step_context():
        return (weight @ weight).dtype


class DataLoaderTimer:
    """A profiler that times how long fetching batches takes, and passes everything on to another profiler.

    Args:
        profiler: The user's.
    """

    def __init__(self, profiler: Profiler) -> None:
        self.profiler = profiler
        self.profile = profiler.profile  # called around every hook of every callback, so not through __getattr__
        self._started = self._seconds = 0.0

    def start(self, action_name: str) -> None:
        """Start timing if the action is fetching."""
        self.profiler.start(action_name)
        if action_name == FETCH_BATCH_ACTION:
            self._started = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Stop timing."""
        if action_name == FETCH_BATCH_ACTION:
            self._seconds += time.perf_counter() - self._started
        self.profiler.stop(action_name)

    def take(self) -> float:
        """Seconds since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.profiler, name)


COLLECT_EVERY = 32
"""Number of marks that are read together: one at a time, with cold caches, they would take twice as long."""


class TimerEvent(Protocol):
    """A point in time, with the interface of ``torch.cuda.Event``."""

    def record(self) -> Any:
        """Record the event: on a device, when all work submitted so far is done."""

    def query(self) -> bool:
        """Whether the event has happened."""

    def synchronize(self) -> None:
        """Wait until the event has happened."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to another."""


class HostTimerEvent:
    """An event on the host's clock."""

    def record(self) -> None:
        """Record the event now."""
        self._at = time.perf_counter()

    def query(self) -> bool:
        """A recorded event has always happened."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end_event: "HostTimerEvent") -> float:
        """Milliseconds from this event to another."""
        return 1000 * (end_event._at - self._at)


# Not MPS: reading the time between two of its events waits for the device.
EVENT_TYPES: dict[str, Callable[[], TimerEvent]] = {
    "cpu": HostTimerEvent,
    "cuda": partial(torch.cuda.Event, enable_timing=True),
}


class StepTimer:
    """Accumulates the seconds between marks by the phase that each mark ends.

    On an accelerator, marks are events in its stream: they cost the host almost nothing, and the time between two of
    them is counted once the device has passed both. Only ``finish`` waits for the device.

    Args:
        device: Device of the computation; on one whose events cannot be read without waiting, nothing is counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.running = False
        self._event = EVENT_TYPES.get(device.type)
        self._marks: deque[tuple[str | None, Mapping[str, float], TimerEvent]] = deque()
        self._last: TimerEvent | None = None
        self._seconds = dict.fromkeys(STEP_PHASES, 0.0)

    def start(self) -> None:
        """Start counting."""
        self.running = True
        self._record(None, {})

    def stop(self) -> None:
        """Stop counting; the time since the last mark is discarded."""
        self.running = False

    def mark(self, phase: str, waits: Mapping[str, float] | None = None) -> None:
        """End a phase: the time since the last mark belongs to ``phase``. Does nothing while stopped.

        Args:
            phase: One of ``STEP_PHASES``.
            waits: Seconds within it that count as other phases, by phase, e.g. while the host waited for data. They are
                limited to the phase's own time: an accelerator with work left has waited less than the host.
        """
        if self.running:
            self._record(phase, waits or {})

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, up to the last event that has happened."""
        self._collect()
        taken, self._seconds = self._seconds, dict.fromkeys(STEP_PHASES, 0.0)
        return taken

    def finish(self) -> dict[str, float]:
        """Stop, wait for the device, and return the remaining seconds by phase."""
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
        if len(self._marks) > COLLECT_EVERY:  # so that they do not accumulate in a run that never logs
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
