"""What a run costs in a sweep beyond `fit` itself.

    python experiments/benchmarks/sweep_cost.py

The same short run, once by the shell for each seed, and in two sweeps, of one seed and of several. What the longer
sweep takes longer, for each run, less what a run takes by the shell, is the cost; what a sweep takes once (reading
flags, the report) is told beside it.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

FLAGS = {
    "trainer.max_steps": 4, "trainer.accelerator": "cpu", "data.max_bytes": 300000, "data.block_size": 32,
    "data.batch_size": 4, "model.gpt.n_layer": 2, "model.gpt.n_head": 2, "model.gpt.n_embd": 32,
    "model.compile": "false",
}  # fmt: skip


def timed(module: str, *args: str) -> float:
    """Seconds that a door takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, *args], check=True, capture_output=True)
    return time.perf_counter() - began


def sweep(folder: Path, seeds: int) -> float:
    """Seconds of a sweep of one trial with so many seeds."""
    path = folder / f"seeds_{seeds}.yaml"
    fixed = ", ".join(f"{name}: {value}" for name, value in FLAGS.items())
    path.write_text(f"fixed: {{{fixed}}}\nvary: {{model.gpt.position: [rotary]}}\nseeds: {list(range(seeds))}\n")
    return timed("lit_gpt_scratch.sweep", str(path), "--runs", str(folder / f"sweep_{seeds}"))


def main() -> None:
    """Measure, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4, help="of the longer sweep")
    seeds = parser.parse_args().seeds
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed("lit_gpt_scratch.fit", *flags, "--plan")  # the tokens are made
        alone = [timed("lit_gpt_scratch.fit", *flags, f"--seed_everything={n}", f"--runs={folder / 'shell'}")
                 for n in range(seeds - 1)]  # fmt: skip
        short, long = sweep(folder, 1), sweep(folder, seeds)
    a_run = (long - short) / (seeds - 1)
    print(
        f"{platform.machine()}: a run by the shell {fmean(alone):.2f} s ({min(alone):.2f} to {max(alone):.2f}), in a "
        f"sweep {a_run:.2f} s: {a_run - fmean(alone):+.2f} s a run; once a sweep {short - a_run:.2f} s"
    )


if __name__ == "__main__":
    main()
