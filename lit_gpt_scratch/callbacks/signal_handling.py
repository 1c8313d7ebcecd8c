"""Stopping when the system or the user asks for it."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.callbacks.checkpointing import Checkpointing
from lit_gpt_scratch.data.base_datamodule import STOP_SIGNALS
from lit_gpt_scratch.distributed.collectives import HostReducer
from lit_gpt_scratch.lightning_compat import disable_signal_handlers, is_validating_between_steps

log = logging.getLogger(__name__)


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """End the program with the conventional exit code when a signal comes, cleaning up behind it."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # the only one that Python lets handle signals
        before = {signum: signal.signal(signum, _exit) for signum in STOP_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _exit(signum: int, frame: FrameType | None = None) -> None:
    raise SystemExit(128 + signum)


class SignalHandling(Callback):
    """On a signal finish the step, save once, say how to go on, and exit with 128 + the signal's number.

    One rank that is signalled stops all of them, after the same step. A second signal changes nothing. Before the
    first step of this process there is nothing to save, and a single process ends at once.

    Args:
        checkpoints: What saves; None if the run saves nothing.
    """

    def __init__(self, checkpoints: Checkpointing | None) -> None:
        self.checkpoints = checkpoints
        self.signum = 0
        """The signal that came, or 0."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note signals from here on: all ranks are there, and can agree.

        In the place of Lightning's handlers, which broadcast from within, amid whatever the ranks were doing.
        """
        self._agreement = HostReducer()
        self._trainer, self._first_step = trainer, -1
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            disable_signal_handlers(trainer)
            self._before = {signum: signal.signal(signum, self._note) for signum in STOP_SIGNALS}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put back what was."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know what is there already."""
        self._first_step = trainer.global_step

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._trainer.world_size == 1 and self._first_step in (-1, self._trainer.global_step):
            _exit(signum)
        self.signum = self.signum or signum

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: save and stop, if any rank was asked to."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._agreed():
            if self.checkpoints and trainer.global_step > self._first_step:
                self.checkpoints.save_last(trainer)
            self._stop(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Amid a validation of a run: stop; what was trained was saved before it."""
        if is_validating_between_steps(trainer) and self._agreed():
            self._stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Settle what came too late to stop anything; all ranks end alike."""
        self._agreed()

    def leave(self, trainer: L.Trainer) -> NoReturn:
        """End this process with the exit code that the signal stands for."""
        if trainer.world_size > 1 and trainer.local_rank and not _is_launched_externally(trainer):
            raise SystemExit(0)  # Lightning's launcher kills the first rank when a process that it started fails
        raise SystemExit(128 + self.signum)

    def _agreed(self) -> bool:
        agreed = self._agreement.max(self.signum)
        self.signum = self.signum or agreed  # a signal that came while the ranks agreed counts the next time
        return bool(agreed)

    def _stop(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            folder = self.checkpoints and self.checkpoints.folder
            saved = folder and (folder.last.exists() or trainer.global_step > self._first_step)
            go_on = f"go on with: python -m lit_gpt_scratch.fit --ckpt_path {folder.path}" if folder and saved else ""
            name = signal.Signals(self.signum).name
            log.warning("\nstopped by %s after step %d; %s", name, trainer.global_step, go_on or "nothing was saved")
        self.leave(trainer)


def _is_launched_externally(trainer: L.Trainer) -> bool:
    return bool(trainer.strategy.cluster_environment.creates_processes_externally)  # type: ignore[attr-defined]  # of several
