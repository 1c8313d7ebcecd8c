"""Rows that end in every way a row can end; the processes of rows import them by name."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_gpt_scratch.acceptance.row import AcceptanceRow, RowContext, RowFailed, RowSkipped, Values
from lit_gpt_scratch.errors import UserError


def succeed(context: RowContext, **sizes: Any) -> Iterator[Values]:
    print("to the log", flush=True)
    yield {"device": context.device.type}
    yield dict(sizes)


def crash(context: RowContext) -> Iterator[Values]:
    yield {"before": 1}
    print("about to crash", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def leave(context: RowContext) -> Iterator[Values]:
    yield {"before": 1}
    os._exit(7)


def fail(context: RowContext) -> Iterator[Values]:
    yield {"before": 1}
    raise RowFailed("too slow\nby far")


def raise_bug(context: RowContext) -> Iterator[Values]:
    yield {"before": 1}
    raise ZeroDivisionError("division")


def mistake(context: RowContext) -> Iterator[Values]:
    yield {}
    raise UserError("--x is 1; it must be 2")


def skip(context: RowContext) -> Iterator[Values]:
    yield {}
    raise RowSkipped("no fp8")


def not_finite(context: RowContext) -> Iterator[Values]:
    yield {"loss": float("nan"), "speed": float("inf"), "fine": 1.5, "none": None, "yes": True}


def hang(context: RowContext) -> Iterator[Values]:
    yield {"before": 1}
    child = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(child)
    (context.out / "child.pid").write_text(str(process.pid), encoding="utf-8")
    time.sleep(600)


def hang_with_a_session(context: RowContext) -> Iterator[Values]:
    """Hang with a process in a session of its own, which ends when the row does, as in the row about resuming."""
    child = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(child, start_new_session=True)
    try:
        (context.out / "child.pid").write_text(str(process.pid), encoding="utf-8")
        yield {"before": 1}
        time.sleep(600)
    finally:
        process.kill()


def hang_deaf(context: RowContext) -> Iterator[Values]:
    """Hang, and ignore SIGTERM, as a process in a driver call does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield from hang(context)


def doze(context: RowContext) -> Iterator[Values]:
    for number in range(3):
        time.sleep(0.02)
        yield {"number": number}


def is_forked() -> bool:
    return "multiprocessing.forkserver" in " ".join(Path("/proc/self/cmdline").read_text().split("\0"))


def use_device_unless_forked(context: RowContext) -> Iterator[Values]:
    if is_forked():
        raise RuntimeError("CUDA error: initialization error")
    yield {}


def name_start_method(context: RowContext) -> Iterator[Values]:
    yield {"forked": is_forked()}


def rows(*functions: Any, seconds: float = 60) -> list[AcceptanceRow]:
    return [AcceptanceRow(function.__name__, function, seconds) for function in functions]


if __name__ == "__main__":  # a run that tests kill
    from lit_gpt_scratch.acceptance import row_process
    from lit_gpt_scratch.acceptance.scheduler import AcceptanceRun

    row_process.PRELOADED = ()
    measured = [AcceptanceRow(f"doze {n}", doze, 60) for n in range(40)]
    if sys.argv[2:] == ["hang"]:
        measured[1] = AcceptanceRow("hang", hang_with_a_session, 60)
    AcceptanceRun(measured, Path(sys.argv[1])).run()
