"""Measure the time that `Trainer.save_checkpoint` takes in a run of `fit`, relative to the duration of the run.

python experiments/benchmarks/saving.py [fit flags]
"""

import platform
import sys
import tempfile
import time
from typing import Any

import lightning as L

from lit_gpt_scratch.cli import entrypoint
from lit_gpt_scratch.cli.fit import main

spent: list[float] = []
save = L.Trainer.save_checkpoint


def timed(*args: Any, **kwargs: Any) -> None:
    """Save a checkpoint and record the duration."""
    began = time.perf_counter()
    save(*args, **kwargs)
    spent.append(time.perf_counter() - began)


if __name__ == "__main__":
    L.Trainer.save_checkpoint = timed
    with tempfile.TemporaryDirectory() as runs:
        began = time.perf_counter()
        entrypoint.run(lambda: main([*sys.argv[1:], f"--runs={runs}"]))
        whole = time.perf_counter() - began
    print(f"{platform.machine()}: {len(spent)} saves, {sum(spent):.3f} s of {whole:.1f} s, {sum(spent) / whole:.2%}")
