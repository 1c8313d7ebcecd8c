"""Processes that load batches beside the training."""

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
