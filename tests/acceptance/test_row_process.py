"""A row that crashes, hangs or raises costs only itself, and keeps the values that it had yielded."""

import atexit
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.acceptance import row_process
from lit_gpt_scratch.acceptance.live_values import report
from lit_gpt_scratch.acceptance.row import AcceptanceRow, RowContext, RowFailed, RowRecord
from lit_gpt_scratch.acceptance.row_process import run_row
from tests.acceptance import sample_rows


@pytest.fixture(autouse=True)
def _light_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_process, "PRELOADED", ("tests.acceptance.sample_rows", __name__))
    monkeypatch.setattr(row_process, "EXIT_GRACE_SECONDS", 0.3)


def run(function: Any, folder: Path, seconds: float = 60, **sizes: Any) -> RowRecord:
    context = RowContext(torch.device("cpu"), folder, folder)
    return run_row(AcceptanceRow("a row", function, seconds, sizes), context, seconds, folder / "row.log")


def test_values_and_output_of_a_row(tmp_path: Path) -> None:
    found = run(sample_rows.succeed, tmp_path, size=3)
    assert (found["status"], found["reason"]) == ("ok", "")
    assert found["values"] == {"device": "cpu", "size": 3}
    assert (tmp_path / "row.log").read_text(encoding="utf-8") == "to the log\n"


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [
        (sample_rows.crash, "failed", "the process was killed by SIGSEGV: about to crash"),
        (sample_rows.leave, "failed", "the process ended with exit code 7"),
        (sample_rows.fail, "failed", "too slow by far"),
        (sample_rows.raise_bug, "failed", "ZeroDivisionError: division"),
        (sample_rows.mistake, "failed", "--x is 1; it must be 2"),
        (sample_rows.skip, "skipped", "no fp8"),
    ],
)
def test_ends_of_a_row(tmp_path: Path, function: Any, status: str, reason: str) -> None:
    found = run(function, tmp_path)
    assert (found["status"], found["reason"]) == (status, reason)
    assert found["values"] in ({"before": 1}, {})


def test_numbers_that_json_lacks_become_text(tmp_path: Path) -> None:
    found = run(sample_rows.not_finite, tmp_path)
    assert found["values"] == {"loss": "nan", "speed": "inf", "fine": 1.5, "none": None, "yes": True}


@pytest.mark.skipif(os.name != "posix", reason="process groups")
@pytest.mark.parametrize("function", [sample_rows.hang, sample_rows.hang_with_a_session, sample_rows.hang_deaf])
def test_row_and_its_children_are_killed_at_the_deadline(tmp_path: Path, function: Any) -> None:
    run(sample_rows.succeed, tmp_path)  # starts the server from which processes are forked
    began = time.monotonic()
    found = run(function, tmp_path, seconds=2)
    assert found["status"] == "out of time"
    assert found["values"] == {"before": 1}
    assert time.monotonic() - began < 20
    child, deadline = int((tmp_path / "child.pid").read_text(encoding="utf-8")), time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which nobody has waited for, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def write_failure_when_stopped(context: RowContext) -> Any:
    """A row that turns its end into a failure, as a library may do."""
    yield {"before": 1}
    try:
        time.sleep(600)
    except SystemExit as end:
        raise RowFailed("the effect of being stopped") from end


def test_failure_after_the_deadline_is_not_the_rows(tmp_path: Path) -> None:
    found = run(write_failure_when_stopped, tmp_path, seconds=2)
    assert (found["status"], found["reason"]) == ("out of time", "stopped after 2 s")


def fail_and_linger(context: RowContext) -> Any:
    atexit.register(time.sleep, 600)
    yield {"before": 1}
    raise RowFailed("its own")


def test_failure_before_the_deadline_is_the_rows(tmp_path: Path) -> None:
    """Also if the process has not ended by then."""
    found = run(fail_and_linger, tmp_path, seconds=4)
    assert (found["status"], found["reason"]) == ("failed", "its own")


def hang_in_fit(context: RowContext) -> Any:
    report({"steps": 7})
    time.sleep(600)
    yield {}


def test_values_reported_while_running_are_kept(tmp_path: Path) -> None:
    found = run(hang_in_fit, tmp_path, seconds=2)
    assert (found["status"], found["values"]) == ("out of time", {"steps": 7})


def test_start_of_a_process_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that starts after its deadline is stopped at once."""
    processes = multiprocessing.get_context(row_process.START_METHOD)
    start = processes.Process.start

    def start_slowly(self: Any) -> None:
        start(self)
        time.sleep(2)

    monkeypatch.setattr(processes.Process, "start", start_slowly)
    began = time.monotonic()
    found = run(sample_rows.hang, tmp_path, seconds=2)
    assert found["status"] == "out of time"
    assert time.monotonic() - began < 3.5
