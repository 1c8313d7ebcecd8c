"""Compare the model that `fit --budget` chooses with the default model, trained for as long.

    python experiments/benchmarks/budget.py [--budget 2min] [--seeds 3] [--threads 2] [--workers 1] [--runs FOLDER]

The default model is trained for its default number of steps, or for as many as fit into the budget if these are more;
for this, a short run is timed. With two workers, both runs of a seed take place at the same time. Compilation and
validation are part of the budget, but not of the throughput of the short run, so that longer default runs take slightly
longer than the budget.

Prints the validation bits per byte and the duration of each run, and the mean difference with its 95% interval, paired
by seed.
"""

import argparse
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from fitting import fit

from lit_gpt_scratch.cli.budget import Budget
from lit_gpt_scratch.sweeps.statistics import estimate_mean

DEFAULT_STEPS, TIMED_STEPS = 900, 100


def scaled_steps(budget: Budget, timed: dict[str, Any]) -> int:
    """Return the number of steps for which the default model is trained."""
    tokens_per_step = timed["tokens"] / timed["step"]
    return max(DEFAULT_STEPS, int(budget.amount * timed["tokens_per_second"] / tokens_per_step))


def main() -> None:
    """Train all models, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="2min")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, default=1, choices=(1, 2))
    parser.add_argument("--runs", type=Path, help="folder that contains the runs; finished runs are reused")
    given = parser.parse_args()
    budget = Budget.parse(given.budget)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.workers) as pool:
        runs = given.runs or Path(folder)

        def train(name: str, *flags: str) -> dict[str, Any]:
            return fit(runs, name, given.threads, *flags)[1]

        short = [f"--trainer.max_steps={TIMED_STEPS}"] * given.workers
        timed = list(pool.map(train, ("timed_0", "timed_1"), short))
        steps = scaled_steps(budget, timed[0])
        flags = {"default": f"--trainer.max_steps={steps}", "budget": f"--budget={given.budget}"}
        print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {given.threads} threads per run")
        print(f"torch {torch.__version__}; --budget {given.budget} against the default model with {steps:,} steps\n")
        found: dict[str, list[float]] = {name: [] for name in flags}
        for seed in range(given.seeds):
            names = [f"{name}_{given.budget}_{seed}" for name in flags]
            done_runs = pool.map(train, names, flags.values(), [f"--seed_everything={seed}"] * len(flags))
            for name, done in zip(flags, done_runs, strict=True):
                found[name].append(done["val/bits_per_byte"])
                print(
                    f"seed {seed}  {name:8} {done['val/bits_per_byte']:.4f} bits per byte  {done['wall']:5.0f} s "
                    f"(training {done['seconds']:4.0f} s)  {done['parameters']:,} parameters, "
                    f"{done['tokens']:,} tokens in {done['step']:,} steps",
                    flush=True,
                )
        difference = [a - b for a, b in zip(found["budget"], found["default"], strict=True)]
        print(f"\nmean: {', '.join(f'{name} {estimate_mean(values).mean:.4f}' for name, values in found.items())}")
        print(f"difference (budget minus default): {estimate_mean(difference)} bits per byte")


if __name__ == "__main__":
    main()
