"""Signal handling: save and exit cleanly on SIGINT, SIGTERM and the like."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.callbacks.checkpointing import Checkpointing, HostReducer
from lit_gpt_scratch.data.base_datamodule import STOP_SIGNALS
from lit_gpt_scratch.lightning_compat import disable_signal_handlers, is_validating_between_steps

log = logging.getLogger(__name__)


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Context in which a signal raises ``SystemExit`` with 128 + its number, so that cleanup code runs."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # only there may Python install handlers
        before = {signum: signal.signal(signum, _exit) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _exit(signum: int, frame: FrameType | None = None) -> None:
    raise SystemExit(128 + signum)


class SignalHandling(Callback):
    """On a signal: finish the step, save ``last.ckpt``, print how to resume, and exit with 128 + the signal's number.

    A signal to one rank stops all of them after the same step. A second signal changes nothing. Before the first step
    of this process there is nothing to save, and a single process exits at once.

    Args:
        checkpoints: Saves ``last.ckpt``; None if the run saves nothing.
    """

    def __init__(self, checkpoints: Checkpointing | None) -> None:
        self.checkpoints = checkpoints
        self.signum = 0
        """The signal received, or 0."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Install the handlers; from here on all ranks exist and can agree to stop.

        They replace Lightning's, which run a broadcast inside the handler, whatever collective the rank was in.
        """
        self._reducer = HostReducer()
        self._trainer, self._first_step = trainer, -1
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            disable_signal_handlers(trainer)
            self._before = {signum: signal.signal(signum, self._record_signal) for signum in STOP_SIGNALS}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the former handlers."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the step that this process starts from."""
        self._first_step = trainer.global_step

    def _record_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._trainer.world_size == 1 and self._first_step in (-1, self._trainer.global_step):
            _exit(signum)
        self.signum = self.signum or signum

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: save and stop if any rank received a signal."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._signal_received():
            if self.checkpoints and trainer.global_step > self._first_step:
                self.checkpoints.save_last(trainer)
            self._stop(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """During validation: stop at once; the weights were saved before it began."""
        if is_validating_between_steps(trainer) and self._signal_received():
            self._stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Agree on a signal that came too late to stop the run, so that all ranks exit alike."""
        self._signal_received()

    def leave(self, trainer: L.Trainer) -> NoReturn:
        """Exit this process with the signal's exit code."""
        if trainer.world_size > 1 and trainer.local_rank and not _is_launched_externally(trainer):
            raise SystemExit(0)  # Lightning's launcher kills rank 0 when a process that it started fails
        raise SystemExit(128 + self.signum)

    def _signal_received(self) -> bool:
        """Whether any rank received a signal (a collective)."""
        agreed = self._reducer.max(self.signum)
        self.signum = self.signum or agreed  # a signal during the collective counts next time
        return bool(agreed)

    def _stop(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            folder = self.checkpoints and self.checkpoints.folder
            saved = folder and (folder.last.exists() or trainer.global_step > self._first_step)
            resume = f"resume with: python -m lit_gpt_scratch.fit --ckpt_path {folder.path}" if folder and saved else ""
            name = signal.Signals(self.signum).name
            log.warning("\nstopped by %s after step %d; %s", name, trainer.global_step, resume or "nothing was saved")
        self.leave(trainer)


def _is_launched_externally(trainer: L.Trainer) -> bool:
    return bool(trainer.strategy.cluster_environment.creates_processes_externally)  # type: ignore[attr-defined]  # of several
