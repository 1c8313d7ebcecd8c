"""Save a checkpoint and exit cleanly on SIGINT, SIGTERM, SIGHUP and SIGUSR1."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import lightning as L

from lit_gpt_scratch.callbacks.checkpointing import StopBetweenSteps
from lit_gpt_scratch.distributed.stop_signals import install_stop_handler
from lit_gpt_scratch.lightning_compat import disable_signal_handlers

log = logging.getLogger(__name__)

_received: list[int] = []
"""Signals that ``exit_on_signal`` has received. Library code may swallow the exception that a signal raises."""


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Context manager that raises ``SystemExit(128 + signal number)`` on a termination signal.

    The exception lets cleanup code run; by default, most termination signals terminate the process immediately.
    """
    before = {}
    _received.clear()
    if threading.current_thread() is threading.main_thread():  # Python allows handlers only in the main thread
        before = install_stop_handler(_exit)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _exit(signum: int, frame: FrameType | None = None) -> None:
    _received.append(signum)
    raise SystemExit(128 + signum)


class SignalHandling(StopBetweenSteps):
    """Callback that handles signals: finish the optimizer step, save ``last.ckpt``, print how to resume, and exit.

    The exit code is 128 + signal number. A signal to one rank stops all ranks after the same step. Further signals are
    ignored. A run with a single process exits immediately if this session has not finished a step yet, because there is
    no progress to save.

    Args:
        checkpoints: The callback that saves ``last.ckpt``, or None if the run saves no checkpoints.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Install the signal handlers; from this point on, all ranks are running and can agree to stop.

        They replace Lightning's handlers, which run a broadcast even if the rank is in the middle of another
        collective.
        """
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            disable_signal_handlers(trainer)
            self._before = install_stop_handler(self._record_signal)
            if _received:  # before training; library code swallowed the exception
                _exit(_received[0])

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _record_signal(self, signum: int, frame: FrameType | None) -> None:
        # Recorded before exiting, because interrupted library code may swallow the exception.
        self.signum = self.signum or signum
        if self._trainer.world_size == 1 and self._first_step in (-1, self._trainer.global_step):
            _exit(signum)

    def leave(self, trainer: L.Trainer) -> NoReturn:
        """Exit with code 128 + signal number."""
        raise SystemExit(128 + self.signum)

    def stop(self, trainer: L.Trainer) -> NoReturn:
        """Print how to resume the run, and exit."""
        if trainer.is_global_zero:
            folder = self.checkpoints and self.checkpoints.folder
            saved = folder and (folder.last.exists() or trainer.global_step > self._first_step)
            resume = f"resume with: python -m lit_gpt_scratch.fit --ckpt_path {folder.path}" if folder and saved else ""
            name = signal.Signals(self.signum).name
            log.warning("\nstopped by %s after step %d; %s", name, trainer.global_step, resume or "nothing was saved")
        self.leave(trainer)
