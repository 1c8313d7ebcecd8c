"""Termination signals, which stop a run or a sweep after its progress is saved."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

STOP_SIGNALS: Final = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]
"""Signals for Ctrl-C, a termination request, a closed terminal, and SLURM's warning before the time limit (if set with
``sbatch --signal=USR1@60``)."""


def install_stop_handler(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler for all ``STOP_SIGNALS``. Must be called from the main thread.

    If SIGHUP is already ignored, it stays ignored, because ``nohup`` ignores it to keep a process running after its
    terminal is closed.

    Returns:
        The previous handlers, keyed by signal number.
    """
    hangup = getattr(signal, "SIGHUP", None)
    return {
        signum: signal.signal(signum, handler)
        for signum in STOP_SIGNALS
        if signum != hangup or signal.getsignal(signum) != signal.SIG_IGN
    }
