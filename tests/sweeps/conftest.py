"""Sweeps of ``stub_fit``, which takes a tenth of a second."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_gpt_scratch.cli import entrypoint
from lit_gpt_scratch.cli.sweep import main

STUB = "tests.sweeps.stub_fit"
ROOT = Path(__file__).parents[2]
SWEEP_SCRIPT = (
    "import sys; from lit_gpt_scratch.cli import entrypoint; from lit_gpt_scratch.cli.sweep import main; "
    f"entrypoint.run(lambda: main(sys.argv[1:], module='{STUB}'))"
)
Rows = list[dict[str, str]]
RunSweep = Callable[..., int]


@pytest.fixture
def sweep_process(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Start a sweep of the stub in a child process, in an empty folder."""

    def start(*args: str | Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", SWEEP_SCRIPT, *map(str, args)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSweep:
    """Run a sweep of the stub in this process, in an empty folder, and return the exit code."""
    from lit_gpt_scratch.sweeps import runner  # requires optuna

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(runner, "RETRY_DELAYS", (0.0, 0.0))

    def run(text: str, *args: str) -> int:
        Path("s.yaml").write_text(text)
        try:
            entrypoint.run(lambda: main(["s.yaml", *args], module=STUB))
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    return run


def read_rows(runs: Path, name: str) -> Rows:
    """The rows of ``results.csv``, without the columns that depend on time and place."""
    with (runs / name / "results.csv").open() as table:
        return [{k: v for k, v in row.items() if k not in ("seconds", "folder")} for row in csv.DictReader(table)]


def read_pids(runs: Path, name: str) -> dict[str, list[int]]:
    """Ids of the processes that executed each run of a sweep."""
    return {
        path.parent.name: [int(pid) for pid in path.read_text().split()] for path in (runs / name).glob("*/started")
    }
