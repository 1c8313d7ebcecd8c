"""Run a row in a process of its own, so that a crash, a full GPU memory or a hang costs only this row."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from typing_extensions import TypedDict

from lit_gpt_scratch.acceptance.live_values import listening
from lit_gpt_scratch.acceptance.row import (
    AcceptanceRow,
    RowContext,
    RowFailed,
    RowRecord,
    RowSkipped,
    Status,
    Values,
    plain_values,
)
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.terminal_output import quote_short
from lit_gpt_scratch.text.atomic_files import write_atomically

START_METHOD: Final = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""With ``forkserver``, the rows are forked from a process that has imported the libraries, but used no device."""
PRELOADED: Final = ("lit_gpt_scratch.acceptance.rows", "lit_gpt_scratch.cli.fit", "lit_gpt_scratch.data")
"""Modules that the rows need; ``fit`` is named here, not imported, because commands may import this package."""
FORK_SAFE_CUDA_CHECK: Final = ("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
"""Variable with which ``torch.cuda.is_available`` does not initialize CUDA, which cannot be used after a fork then."""
KILL_SIGNAL: Final = getattr(signal, "SIGKILL", signal.SIGTERM)
EXIT_GRACE_SECONDS: Final = 3.0
"""Number of seconds that a row has to end its own processes after SIGTERM, before it is killed."""
START_SECONDS: Final = 60.0
"""Maximum number of seconds for the imports of the server from which rows are forked, and a first use of the device."""
REASON_LENGTH: Final = 300
"""Maximum number of characters of a reason."""


_End: TypeAlias = Literal["", "ok", "failed", "skipped"]


class _Progress(TypedDict):
    """What the process of a row has written so far; ``status`` is empty until the row ends."""

    status: _End
    reason: str
    values: dict[str, Any]


def run_row(
    row: AcceptanceRow, context: RowContext, seconds: float, log: Path, start_method: str = START_METHOD
) -> RowRecord:
    """Run a row in a new process, and kill the process and its children at the deadline.

    Args:
        row: The row; ``row.measure`` must be importable by its name.
        context: Where the row runs.
        seconds: Maximum duration in seconds, including the start of the process.
        log: File for the output of the process.
        start_method: Start method of ``multiprocessing``.

    Returns:
        The record of the row, with the values that it had yielded when it ended or was killed.
    """
    began = time.monotonic()
    progress_path = context.scratch / f"{log.stem}.json"
    log.touch()
    processes: Any = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        os.environ.setdefault(*FORK_SAFE_CUDA_CHECK)
        processes.set_forkserver_preload(list(PRELOADED))
    process = processes.Process(
        target=_measure, args=(row.measure, context, row.sizes_on(context.device), progress_path, log), name=row.name
    )
    process.start()
    try:
        process.join(max(0.0, began + seconds - time.monotonic()))
        in_time = not process.is_alive() or bool(_read_progress(progress_path)["status"])
    finally:
        _kill(process)
    found = _read_progress(progress_path)
    status: Status
    if found["status"] and (in_time or found["status"] == "ok"):
        status, reason = found["status"], found["reason"]
    elif in_time:
        status, reason = "failed", _describe_exit(process.exitcode, log)
    else:  # a failure that the row has written since then is the effect of being stopped
        status, reason = "out of time", f"stopped after {seconds:.0f} s"
    return RowRecord(
        row=row.name, status=status, reason=reason, seconds=round(time.monotonic() - began, 2), values=found["values"]
    )


def choose_start_method(context: RowContext) -> tuple[str, str]:
    """Return the start method with which rows can use the device, and why another one cannot be used, if any.

    Also starts the server from which rows are forked, so that its imports do not count towards the first row. A library
    that initializes CUDA when it is imported makes the GPU unusable in all forked processes.
    """
    row = AcceptanceRow("device", use_device, START_SECONDS)
    found = run_row(row, context, START_SECONDS, context.scratch / "device.log")
    if found["status"] == "ok" or START_METHOD == "spawn":
        return START_METHOD, ""
    return "spawn", f"{START_METHOD}: {found['reason']}"


def use_device(context: RowContext) -> Iterator[Values]:
    """Allocate a tensor on the device."""
    torch.zeros(1, device=context.device)
    yield {}


def _kill(process: Any) -> None:
    """End the process and its children: first with SIGTERM, so that it can end processes in groups of their own."""
    if process.is_alive():
        process.terminate()
        process.join(EXIT_GRACE_SECONDS)
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # no process is left in its group
            os.killpg(process.pid, KILL_SIGNAL)  # also children that have outlived the row
    if process.is_alive():
        process.kill()
    process.join()


def _read_progress(path: Path) -> _Progress:
    try:
        return read_json(path, _Progress)
    except (OSError, ValueError):  # the process ended before its first value
        return _Progress(status="", reason="", values={})


def _describe_exit(code: int | None, log: Path) -> str:
    """Describe a process that ended without a result: its signal or exit code, and the last line of its output."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = f": {quote_short(lines[-1], REASON_LENGTH)}" if lines else ""
    if code is not None and code < 0:
        return f"the process was killed by {signal.Signals(-code).name}{last}"
    return f"the process ended with exit code {code}{last}"


# In the process of the row


def _measure(measure: Callable[..., Any], context: RowContext, sizes: dict[str, Any], path: Path, log: Path) -> None:
    """Run a row in this process, and write its progress after each group of values."""
    signal.signal(signal.SIGTERM, _exit)
    _lead_process_group()
    _redirect_output(log)
    values: Values = {}

    def write(status: _End, reason: str = "") -> None:
        progress = _Progress(status=status, reason=quote_short(reason, REASON_LENGTH), values=plain_values(values))
        write_atomically(path, json.dumps(progress))

    def add(found: Values) -> None:
        values.update(found)
        write("")

    try:
        # A row that is interrupted ends its own processes.
        with listening(add), closing(measure(context, **sizes)) as groups:
            for found in groups:
                add(found)
        write("ok")
    except RowSkipped as reason:
        write("skipped", str(reason))
    except (RowFailed, UserError) as reason:
        traceback.print_exc()
        write("failed", str(reason))
    except Exception as error:
        traceback.print_exc()
        first_line = next(iter(str(error).splitlines()), "")
        write("failed", f"{type(error).__name__}: {first_line}")
    finally:
        if not _parent_is_alive():
            _kill_own_group()


def _lead_process_group() -> None:
    """Make this process the leader of a group, and end the group if the process that started it is killed."""
    if hasattr(os, "setsid"):
        os.setsid()

    if not _parent_is_alive():
        _kill_own_group()
    main = threading.get_ident()

    def watch() -> None:
        wait([_parent().sentinel])
        if hasattr(signal, "pthread_kill"):  # interrupts the main thread, which then ends processes in other groups
            signal.pthread_kill(main, signal.SIGTERM)
            time.sleep(EXIT_GRACE_SECONDS)
        _kill_own_group()

    threading.Thread(target=watch, daemon=True).start()


def _parent() -> Any:
    parent = multiprocessing.parent_process()
    assert parent is not None
    return parent


def _parent_is_alive() -> bool:
    return not wait([_parent().sentinel], timeout=0)


def _kill_own_group() -> None:
    if hasattr(os, "killpg"):
        os.killpg(os.getpid(), KILL_SIGNAL)
    os._exit(1)


def _redirect_output(log: Path) -> None:
    """Send the output of this process and its children to a file, because the terminal shows the table."""
    with log.open("wb") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115


def _exit(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)
