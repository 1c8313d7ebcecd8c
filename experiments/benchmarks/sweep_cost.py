"""What a run costs in a sweep beyond `fit` itself.

    python experiments/benchmarks/sweep_cost.py

A sweep of short runs, one after the other: the time in which none of their processes lives is the sweep's own. What the
module that watches over a run adds to its start is measured with a module that does nothing, begun with it and without.
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
began: list[float] = []
ended: list[float] = []


class Timed(RunProcess):
    """Takes the time of its beginning, and of its end as the sweep learns of it."""

    def __init__(self, *args: Any) -> None:
        began.append(time.perf_counter())
        super().__init__(*args)

    def wait(self, seconds: float) -> int | None:
        """Wait, and note the end."""
        code = super().wait(seconds)
        if code is not None and len(ended) < len(began):
            ended.append(time.perf_counter())
        return code


def start(*args: str) -> float:
    """Seconds of a process that does nothing, whose standard input stays open as that of a run does."""
    at = time.perf_counter()
    command = [sys.executable, "-m", *args]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        assert process.wait() == 0
        return time.perf_counter() - at


def measure() -> None:
    """Run the sweep, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of the sweep")
    runs = parser.parse_args().runs
    runner.RunProcess = Timed  # type: ignore[misc]  # to look inside
    fixed = ", ".join(f"{name}: {value}" for name, value in FLAGS.items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cost.yaml")
        path.write_text(f"fixed: {{{fixed}}}\nvary: {{model.gpt.position: [rotary]}}\nseeds: {list(range(runs))}\n")
        at = time.perf_counter()
        entrypoint.run(lambda: main([str(path), "--runs", folder]))
        whole = time.perf_counter() - at
    alive = [end - begin for begin, end in zip(began, ended, strict=True)]
    between = (began[-1] - began[0] - sum(alive[:-1])) / (runs - 1)
    plain, watched = (
        median(start(*how, "this") for _ in range(10)) for how in ([], ["lit_gpt_scratch.sweeps.run_process"])
    )
    print(
        f"{platform.machine()}: {runs} runs of fit of {median(alive):.1f} s; from the end of one to the begin of the "
        f"next {between:.3f} s, and {watched - plain:.3f} s in its process; once a sweep {whole - sum(alive):.1f} s"
    )


if __name__ == "__main__":
    measure()
