"""A run as a process of its own."""

import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lit_gpt_scratch.distributed.cpu_count import count_available_cpus

GRACE = 120.0
"""Seconds that a run has to save and leave when it is asked to."""
THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
"""Where torch and tokenizers read how many threads to start."""


class RunProcess:
    """Start a run in a session of its own: a terminal's Ctrl-C reaches the sweep alone, which then asks the run.

    Args:
        module: To run; ``fit``, but in tests of the sweep itself.
        arguments: Its flags.
        log: File for all that it says.
        workers: Runs that share the cores of this machine.
    """

    def __init__(self, module: str, arguments: Sequence[str], log: Path, workers: int = 1) -> None:
        environment = dict(os.environ)
        if workers > 1:
            share = str(max(1, count_available_cpus() // workers))
            environment = dict.fromkeys(THREADS, share) | environment
        self._log = log
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lit_gpt_scratch.sweeps.run_process", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> int | None:
        """The exit code, if it comes in time."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def stop(self) -> None:
        """Ask it to save and leave; end it if it does not."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        if self.wait(GRACE) is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def reason(self) -> str:
        """Why it failed, in one line: what it said last, or the signal that ended it."""
        code = self._process.returncode
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        said = self._log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in re.split(r"[\r\n]+", said) if line.strip()]
        told = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        return (told or (lines[-1] if lines else f"exit code {code}")).removeprefix("error: ")


def _end_with_parent() -> None:
    os.read(0, 1)  # no buffered reader: its lock would be held when Python shuts down
    os.killpg(0, signal.SIGKILL)  # other ranks and loaders, too


if __name__ == "__main__":
    module = sys.argv.pop(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
