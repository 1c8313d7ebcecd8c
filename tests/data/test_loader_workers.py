"""Loader workers ignore stop signals, and end with the program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_gpt_scratch.data.base_datamodule import reserve_open_files
from lit_gpt_scratch.distributed.stop_signals import STOP_SIGNALS
from lit_gpt_scratch.errors import UserError

LOADER = """
import os, signal, sys
from torch.utils.data import DataLoader
from lit_gpt_scratch.data.base_datamodule import ignore_stop_signals
batches = iter(DataLoader(range(100), num_workers=2, worker_init_fn=ignore_stop_signals))
next(batches), next(batches)  # both workers are at work
"""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", LOADER + code], capture_output=True, text=True, timeout=200)


SIGNALS = [signum.value for signum in STOP_SIGNALS] if os.name == "posix" else []


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(7)", 7), pytest.param("raise KeyError", 1, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_workers_ignore_stop_signals_and_end_with_the_program(end: str, code: int) -> None:
    """Even if their loader is still referenced and was not closed."""
    kill = f"[os.kill(worker.pid, n) for worker in batches._workers for n in {SIGNALS}]"
    done = run(f"{kill}\nprint(sum(len(next(batches)) for _ in range(90)))\n{end}")
    assert done.stdout.split() == ["90"]
    assert done.returncode == code
    assert ("Traceback" in done.stderr) == (code == 1)
    assert "worker" not in done.stderr.replace("ignore_stop_signals", "").replace("batches._workers", "")


def test_limit_on_open_files_is_raised_for_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        enough = len(list(Path("/proc/self/fd").glob("*"))) + 60
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, before[1]))
        reserve_open_files(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == enough
        reserve_open_files(30)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > enough + 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 200))
    with pytest.raises(UserError, match=r"data\.num_workers is 30.*the limit is 200; raise it with ulimit -n"):
        reserve_open_files(30)
