"""Measure the overhead of a run in a sweep, compared with running `fit` directly.

    python experiments/benchmarks/sweep_cost.py

In a sweep of short consecutive runs, the time during which no run process is alive is overhead of the sweep. In
addition, the module that supervises a run delays its start; this delay is measured by starting an empty module with
and without the supervising module.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from lit_gpt_scratch.cli import entrypoint
from lit_gpt_scratch.cli.sweep import main
from lit_gpt_scratch.sweeps import runner
from lit_gpt_scratch.sweeps.run_process import RunProcess

FLAGS = {
    "trainer.max_steps": 4, "trainer.accelerator": "cpu", "data.max_bytes": 300000, "data.block_size": 32,
    "data.batch_size": 4, "model.gpt.n_layer": 2, "model.gpt.n_head": 2, "model.gpt.n_embd": 32,
    "model.compile": "false",
}  # fmt: skip
started: list[float] = []
ended: list[float] = []


class TimedRunProcess(RunProcess):
    """Run process that records when it starts and when the sweep detects that it has ended."""

    def __init__(self, *args: Any) -> None:
        started.append(time.perf_counter())
        super().__init__(*args)

    def wait(self, seconds: float) -> int | None:
        """Wait for the process to end, and record the time of its end."""
        code = super().wait(seconds)
        if code is not None and len(ended) < len(started):
            ended.append(time.perf_counter())
        return code


def time_empty_module(*args: str) -> float:
    """Return the seconds that a process with an empty module takes, with its standard input open as in a run."""
    start = time.perf_counter()
    command = [sys.executable, "-m", *args]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        assert process.wait() == 0
        return time.perf_counter() - start


def measure() -> None:
    """Run the sweep and print the results in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="number of runs in the sweep")
    runs = parser.parse_args().runs
    runner.RunProcess = TimedRunProcess  # type: ignore[misc]  # to record times
    fixed = ", ".join(f"{name}: {value}" for name, value in FLAGS.items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cost.yaml")
        path.write_text(f"fixed: {{{fixed}}}\nvary: {{model.gpt.position: [rotary]}}\nseeds: {list(range(runs))}\n")
        start = time.perf_counter()
        entrypoint.run(lambda: main([str(path), "--runs", folder]))
        total = time.perf_counter() - start
    durations = [end - begin for begin, end in zip(started, ended, strict=True)]
    between = (started[-1] - started[0] - sum(durations[:-1])) / (runs - 1)
    plain, wrapped = (
        median(time_empty_module(*how, "this") for _ in range(10))
        for how in ([], ["lit_gpt_scratch.sweeps.run_process"])
    )
    print(
        f"{platform.machine()}: {runs} runs of fit of {median(durations):.1f} s; between two runs {between:.3f} s, "
        f"in the process of a run {wrapped - plain:.3f} s, once per sweep {total - sum(durations):.1f} s"
    )


if __name__ == "__main__":
    measure()
