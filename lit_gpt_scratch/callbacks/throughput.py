"""How fast tokens go through, and where the time goes."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from torch import Tensor

from lit_gpt_scratch.batch_types import Batch
from lit_gpt_scratch.callbacks.metric_logging import log_metrics
from lit_gpt_scratch.distributed.collectives import HostReducer
from lit_gpt_scratch.lightning_compat import FETCH_BATCH_ACTION
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.profiling.flops_and_memory import training_flops_per_token
from lit_gpt_scratch.profiling.peak_flops import peak_flops
from lit_gpt_scratch.profiling.peak_memory import peak_memory
from lit_gpt_scratch.profiling.step_timer import STEP_PHASES, StepTimer
from lit_gpt_scratch.tasks.rl.on_policy import OnPolicyModule

TIME_SHARE_TAGS = tuple(f"throughput/{part}" for part in STEP_PHASES)
"""The shares' names in TensorBoard."""


class Throughput(Callback):
    """Log how fast training is and what holds it up, at log points.

    - ``tokens``: seen in training so far, over all ranks.
    - ``tokens_per_second``: since the last log point.
    - ``throughput/data``, ``/generation``, ``/forward``, ``/backward``, ``/optimizer``, ``/rest``: shares of a step's
      time on the first rank, together 1. ``data`` is waiting for the next batch, ``generation`` writing and scoring
      replies, where a policy learns from its own. ``optimizer`` is from the last backward pass to the end of the step:
      clipping, the update, the schedule. ``rest`` is what callbacks and loggers do between steps.
      On a GPU they are shares of its own time: waiting for data that it was not kept from work by does not count.
      On other accelerators there are none, because their clocks cannot be read without waiting for them.
    - ``throughput/model_flops_utilisation``: of what the devices could do at best. A token costs ``6N + 12LdT``
      operations (``training_flops_per_token``); their best is the data sheet's dense figure for this GPU and
      precision, and where none is known, what a matrix product reaches here (``peak_flops``). Only of a task whose
      ``net`` is a GPT.
    - ``throughput/peak_memory_gigabytes``: most of any rank, validations included; see ``peak_memory``.

    Times are of training alone: validation, sampling and saving are left out, and so is the first step, which
    compiles. The device is never waited for but at the end of training.
    """

    def __init__(self) -> None:
        self.tokens = 0
        """Training tokens over all ranks, the whole run."""
        self.seconds = 0.0
        """Seconds of training that ``timed_tokens`` took."""
        self.timed_tokens = 0
        self.tokens_per_second = 0.0
        self.peaks: dict[str, float] = {}
        """Operations a second of all devices together: ``nominal``, if that is known, and ``measured``."""
        self._parts = dict.fromkeys(STEP_PHASES, 0.0)
        self._memory: float | None = None
        self._flops_per_token = 0
        self._clock = StepTimer(torch.device("cpu"))
        self._waiting = DataLoaderTimer(PassThroughProfiler())
        self._began = 0.0
        self._warm = False
        self._step = 0
        self._window_tokens = 0
        self._window_seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn what the devices can do; the first step of this process will compile, and is left out."""
        self._warm, self._step = False, trainer.global_step
        self._clock = StepTimer(pl_module.device)
        self._ranks = HostReducer()
        self._waiting = DataLoaderTimer(trainer.profiler)  # type: ignore[attr-defined]  # the trainer sets it late
        trainer.profiler = self._waiting  # type: ignore[attr-defined]  # the same
        net = getattr(pl_module, "net", None)
        if isinstance(net, GPT):
            self._flops_per_token = training_flops_per_token(net)
            peaks = peak_flops(pl_module.device, matmul_dtype(trainer, pl_module))
            self.peaks = {kind: trainer.world_size * flops for kind, flops in peaks.items()}
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)  # the products were not the run's

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock where validation or the start of the run stopped it."""
        apart = {"data": self._waiting.take()}
        if isinstance(pl_module, OnPolicyModule):
            apart["generation"] = pl_module.writing.take()
        if self._clock.running:
            self._clock.mark("rest", apart)
        elif self._warm:
            self._began = time.perf_counter()
            self._clock.start()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """The forward pass is done."""
        self._clock.mark("forward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The backward pass is done."""
        self._clock.mark("backward")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch; report at log points."""
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        shard = trainer.distributed_sampler_kwargs or {"num_replicas": 1}  # tensor-parallel ranks share their batch
        tokens = batch["input_ids"].numel() * shard["num_replicas"]
        self.tokens += tokens
        self._clock.mark("optimizer" if stepped else "rest")
        if self._clock.running:
            now = time.perf_counter()
            self._window_tokens += tokens
            self._window_seconds += now - self._began
            self._began = now
        self._warm = self._warm or stepped
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
        if stepped and every and trainer.global_step % every == 0:
            self._log(trainer, pl_module)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parts = self._clock.take()
        counts, figures = {"tokens": float(self.tokens)}, time_shares(parts)
        if self._close_window(parts):
            counts["tokens_per_second"] = self.tokens_per_second
            utilisation = list(self.utilisation(self.tokens_per_second).values())
            figures |= {"model_flops_utilisation": utilisation[0]} if utilisation else {}
        memory = self._peak_gigabytes(pl_module.device)
        figures |= {} if memory is None else {"peak_memory_gigabytes": memory}
        log_metrics(trainer, counts | {f"throughput/{name}": value for name, value in figures.items()}, self._step - 1)

    @property
    def mean(self) -> float | None:
        """Training tokens per second over this session, or None before anything was timed."""
        return self.timed_tokens / self.seconds if self.seconds else None

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOP utilisation at this speed, of each of the ``peaks``."""
        return {kind: tokens_per_second * self._flops_per_token / peak for kind, peak in self.peaks.items()}

    @property
    def figures(self) -> dict[str, Any]:
        """This session's means: shares, utilisation of each peak, the peaks in TFLOP/s, and the peak of memory."""
        return {
            **time_shares(self._parts),
            "model_flops_utilisation": self.utilisation(self.mean) if self.mean else {},
            "peak_teraflops": {kind: peak / 1e12 for kind, peak in self.peaks.items()},
            "peak_memory_gigabytes": self._memory,
        }

    def _close_window(self, parts: dict[str, float]) -> bool:
        """Take the speed since the last time; False if nothing was timed."""
        for part, seconds in parts.items():
            self._parts[part] += seconds
        if not self._window_seconds:
            return False
        self.timed_tokens += self._window_tokens
        self.seconds += self._window_seconds
        self.tokens_per_second = self._window_tokens / self._window_seconds
        self._window_tokens, self._window_seconds = 0, 0.0
        return True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count what came after the last log point."""
        trainer.profiler = self._waiting.chosen  # type: ignore[attr-defined]  # the trainer sets it late
        self._close_window(self._clock.finish())
        self._memory = self._peak_gigabytes(pl_module.device)

    def _peak_gigabytes(self, device: torch.device) -> float | None:
        memory = peak_memory(device)
        return None if memory is None else self._ranks.max(memory) / 1e9

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._clock.stop()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the clock."""
        self._clock.stop()

    def state_dict(self) -> dict[str, Any]:
        """Tokens so far, so that a resumed run counts on."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.tokens = state_dict["tokens"]


def time_shares(seconds: dict[str, float]) -> dict[str, float]:
    """Each part of the whole; nothing of nothing."""
    whole = sum(seconds.values())
    return {part: its / whole for part, its in seconds.items()} if whole else {}


def matmul_dtype(trainer: L.Trainer, pl_module: L.LightningModule) -> torch.dtype:
    """In what the run's precision multiplies its weights."""
    weight = torch.ones(1, 1, dtype=next(pl_module.parameters()).dtype, device=pl_module.device)
    with trainer.precision_plugin.train_step_context():
        return (weight @ weight).dtype


class DataLoaderTimer:
    """A profiler that adds up the seconds of fetching batches; all else is for the profiler that the user chose."""

    def __init__(self, chosen: Profiler) -> None:
        self.chosen = chosen
        self.profile = chosen.profile  # asked for around every hook of every callback, so not by __getattr__
        self._began = self._seconds = 0.0

    def start(self, action_name: str) -> None:
        """Start the clock."""
        self.chosen.start(action_name)
        if action_name == FETCH_BATCH_ACTION:
            self._began = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Stop it."""
        if action_name == FETCH_BATCH_ACTION:
            self._seconds += time.perf_counter() - self._began
        self.chosen.stop(action_name)

    def take(self) -> float:
        """Seconds since the last time."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.chosen, name)
