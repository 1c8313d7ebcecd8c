"""What each choice of the default recipe is worth: the default with one thing changed, run after run.

    python experiments/benchmarks/recipes.py

Runs `fit` on the standard library for every row of CHANGES and writes `recipes.md` beside this file. Two runs go
side by side, with half of the cores each. Losses do not depend on that; speeds are given relative to the default's
and only roughly right, because the neighbour differs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

SEEDS_OF_THE_DEFAULT = 3
CHANGES = {
    "embeddings' and head's learning rate 3e-3 (was the default)": ["--model.optimizer.adamw_lr=3e-3"],
    "embeddings' and head's learning rate 1.6e-2": ["--model.optimizer.adamw_lr=1.6e-2"],
    "Muon's momentum 0.95 (was the default)": ["--model.optimizer.momentum=0.95"],
    "Muon's learning rate 0.012": ["--model.optimizer.lr=0.012"],
    "Muon's learning rate 0.03": ["--model.optimizer.lr=0.03"],
    "AdamW for everything": ["--model.optimizer=AdamW", "--model.optimizer.lr=5e-3"],
    "decay over the last fifth": ["--model.schedule.decay_share=0.2"],
    "decay over the whole run": ["--model.schedule.decay_share=1.0"],
    "16 windows of 128": ["--data.block_size=128", "--data.batch_size=16"],
    "vocabulary 512": ["--data.vocab_size=512"],
    "vocabulary 2,048": ["--data.vocab_size=2048"],
    "6 layers": ["--model.gpt.n_layer=6"],
    "2 layers": ["--model.gpt.n_layer=2"],
    "switch: NorMuon": ["--model.optimizer.row_beta=0.95"],
    "switch: ReLU squared": ["--model.gpt.feed_forward=relu2"],
    "switch: logit soft-cap 15": ["--model.gpt.logit_softcap=15"],
    "switch: value embeddings": ["--model.gpt.value_embeddings=true"],
    "switch: bigram embeddings, 8,192 rows": ["--model.gpt.bigram_rows=8192"],
    "switch: residual scalars": ["--model.gpt.residual_scalars=true"],
}


def run(flags: list[str], seed: int, steps: int, threads: int) -> dict[str, Any]:
    """One run's summary."""
    with tempfile.TemporaryDirectory() as runs:
        outcome = subprocess.run(
            [
                sys.executable, "-m", "lit_gpt_scratch.fit", f"--runs={runs}", f"--seed_everything={seed}",
                f"--trainer.max_steps={steps}", "--trainer.val_check_interval=1000000", *flags,
            ],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )  # fmt: skip
        if outcome.returncode:
            sys.exit(f"{' '.join(flags)} failed:\n{outcome.stderr[-2000:]}")
        summary: dict[str, Any] = json.loads(next(Path(runs).rglob("summary.json")).read_text(encoding="utf-8"))
    print(f"{summary['val/bits_per_byte']:.4f}  {' '.join(flags) or 'the default'} (seed {seed})", flush=True)
    return summary


def main() -> None:
    """Run all rows, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="shorter than the default run, to save time")
    given = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // 2)
    with ThreadPoolExecutor(2) as pool:
        defaults = [pool.submit(run, [], seed, given.steps, threads) for seed in range(SEEDS_OF_THE_DEFAULT)]
        changed = {name: pool.submit(run, flags, 0, given.steps, threads) for name, flags in CHANGES.items()}
    summaries = [future.result() for future in defaults]
    bits = [summary["val/bits_per_byte"] for summary in summaries]
    speed = mean(summary["tokens_per_second"] for summary in summaries)
    xz = summaries[0]["baselines"]["xz"]
    lines = [
        "# What each choice of the default recipe is worth",
        "",
        f"`python experiments/benchmarks/recipes.py --steps {given.steps}`: validation bits per byte on the standard "
        f"library of Python {platform.python_version()}, {given.steps} steps, one change at a time, seed 0. "
        f"`xz -9` needs {xz:.3f}. The default's {SEEDS_OF_THE_DEFAULT} seeds lie within "
        f"{max(bits) - min(bits):.4f} of each other: differences below that say nothing.",
        "",
        "| change | bits per byte | against the default | speed |",
        "| --- | ---: | ---: | ---: |",
        f"| the default, mean of {SEEDS_OF_THE_DEFAULT} seeds | {mean(bits):.4f} | | 1.00 |",
    ]
    for name, future in changed.items():
        summary = future.result()
        value = summary["val/bits_per_byte"]
        relative = summary["tokens_per_second"] / speed
        lines.append(f"| {name} | {value:.4f} | {value - mean(bits):+.4f} | {relative:.2f} |")
    table = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
