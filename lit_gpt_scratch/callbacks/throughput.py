"""How fast tokens go through."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.batch import Batch


class Throughput(Callback):
    """Log ``tokens`` (seen in training so far, over all ranks) and ``tokens_per_second`` at log points.

    The speed is that of training alone since the last log point: validation, sampling and saving are left
    out, and so is the first step, which compiles.
    """

    def __init__(self) -> None:
        self.tokens = 0
        """Training tokens over all ranks, the whole run."""
        self.seconds = 0.0
        """Seconds of training that ``timed_tokens`` took."""
        self.timed_tokens = 0
        self.tokens_per_second = 0.0
        self._began: float | None = None
        self._warm = False
        self._step = 0
        self._window_tokens = 0
        self._window_seconds = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock where validation or the start of the run stopped it."""
        if self._began is None:
            self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count the batch; report at log points."""
        shard = trainer.distributed_sampler_kwargs or {"num_replicas": 1}  # tensor-parallel ranks share their batch
        tokens = batch["input_ids"].numel() * shard["num_replicas"]
        self.tokens += tokens
        now = time.perf_counter()
        if self._warm and self._began is not None:
            self._window_tokens += tokens
            self._window_seconds += now - self._began
        self._began, self._warm = now, True
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # the trainer sets it late
        if stepped and every and trainer.global_step % every == 0:
            pl_module.log("tokens", float(self.tokens))
            if self._close_window():
                pl_module.log("tokens_per_second", self.tokens_per_second)

    @property
    def mean(self) -> float | None:
        """Training tokens per second over this session, or None before anything was timed."""
        return self.timed_tokens / self.seconds if self.seconds else None

    def _close_window(self) -> bool:
        """Take the speed since the last time; False if nothing was timed."""
        if not self._window_seconds:
            return False
        self.timed_tokens += self._window_tokens
        self.seconds += self._window_seconds
        self.tokens_per_second = self._window_tokens / self._window_seconds
        self._window_tokens, self._window_seconds = 0, 0.0
        return True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The first step of this process will compile: leave it out."""
        self._warm, self._step = False, trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count what came after the last log point."""
        self._close_window()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._began = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stop the clock."""
        self._began = None

    def state_dict(self) -> dict[str, Any]:
        """Tokens so far, so that a resumed run counts on."""
        return {"tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.tokens = state_dict["tokens"]
