"""Execute ``fit`` in child processes that are killed when their parent exits."""

import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from lit_gpt_scratch.distributed.cpu_count import count_available_cpus
from lit_gpt_scratch.errors import is_environment_failure

GRACE_SECONDS = 120.0
"""Time in seconds that a run has between SIGTERM and SIGKILL to save a checkpoint and exit."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
"""Environment variables that set the number of threads of PyTorch and of the tokenizers library."""
ENVIRONMENT_EXIT_CODE: Final = 75
"""Exit code (EX_TEMPFAIL) of a run that failed because of its environment; see ``is_environment_failure``."""
USER_ERROR_EXIT_CODE: Final = 2
"""Exit code of ``fit`` after a ``UserError``."""
RETRYABLE_SIGNALS: Final = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGBUS")
"""Signals with environmental causes: lack of memory, a time limit, or an unreadable file.

Other signals, such as SIGSEGV and SIGABRT, indicate a crash that the run's settings may have caused.
"""


class RunProcess:
    """Child process that executes a Python module in a separate session.

    Because of the separate session, Ctrl-C in a terminal reaches only the sweep process, which then stops its runs.

    Args:
        module: Name of the module to execute: ``fit``, or a stub in tests.
        arguments: Command-line arguments for the module.
        log: File for standard output and standard error.
        workers: Number of runs that share the CPU cores of this machine.
    """

    def __init__(self, module: str, arguments: Sequence[str], log: Path, workers: int = 1) -> None:
        environment = dict(os.environ)
        if workers > 1:
            threads = str(max(1, count_available_cpus() // workers))
            environment = dict.fromkeys(THREAD_VARIABLES, threads) | environment
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lit_gpt_scratch.sweeps.run_process", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> int | None:
        """Wait up to ``seconds`` for the process to exit; return its exit code, or None after a timeout."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def stop(self) -> None:
        """Send SIGTERM so that the run saves a checkpoint, and SIGKILL if it has not exited after ``GRACE_SECONDS``."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        if self.wait(GRACE_SECONDS) is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def failed_by_environment(self) -> bool:
        """Whether the run failed because of its environment, not its settings, and may succeed if it is repeated."""
        return self._killed_by in RETRYABLE_SIGNALS or self._process.returncode == ENVIRONMENT_EXIT_CODE

    @property
    def _killed_by(self) -> str | None:
        """Name of the signal that terminated the process, from its exit code, or None if it exited by itself."""
        code: int = self._process.returncode
        signum = -code if code < 0 else code - 128
        return next((each.name for each in signal.Signals if each == signum), None)

    def failure_reason(self) -> str:
        """Return the reason why the run failed.

        The reason is the signal that killed the process, the last line of output that starts with ``error:``, or, if
        there is none, the last line of output.
        """
        code = self._process.returncode
        if self._killed_by:
            hint = ", possibly for lack of memory" if self._killed_by == "SIGKILL" else ""
            return f"killed by {self._killed_by}{hint}"
        output = self._log.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in re.split(r"[\r\n]+", output) if line.strip()]
        error = next((line for line in reversed(lines) if line.startswith("error: ")), None)
        return (error or (lines[-1] if lines else f"exit code {code}")).removeprefix("error: ")


def run_module(module: str) -> None:
    """Run a module as the main program; exit with ``ENVIRONMENT_EXIT_CODE`` if it fails because of its environment."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except BaseException as error:  # fit reports a failure as SystemExit
        cause: BaseException | None = error
        if isinstance(error, SystemExit):
            cause = error.__context__ if error.code == USER_ERROR_EXIT_CODE else None
        if cause is None or not is_environment_failure(cause):
            raise
        if cause is error:
            traceback.print_exc()
        sys.exit(ENVIRONMENT_EXIT_CODE)


def _exit_with_parent() -> None:
    """Wait until standard input closes, which happens when the parent exits, then kill the process group."""
    os.read(0, 1)  # unbuffered, because at shutdown Python waits for the lock of a buffered reader
    os.killpg(0, signal.SIGKILL)  # includes other ranks and data loader workers


if __name__ == "__main__":
    module = sys.argv.pop(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    run_module(module)
