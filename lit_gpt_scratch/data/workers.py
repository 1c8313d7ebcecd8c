"""Processes that load batches beside the training."""

import atexit
import multiprocessing
import signal
from typing import Final

STOP_SIGNALS: Final = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C, what a system sends before it kills, and what SLURM sends before a time limit (sbatch --signal=USR1@60)."""


def leave_stopping_to_the_trainer(worker: int) -> None:
    """Ignore what asks a run to stop: a terminal and SLURM ask all its processes, and the step needs its batch.

    A worker ends when the trainer closes its loader, or is gone.
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """End workers whose loader nobody closed, as after an error.

    At exit ``multiprocessing`` sends its daemons SIGTERM and waits for them; these would not hear it. This runs
    before: what was registered last is called first.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
