"""Measure the effect of each choice in the default recipe, by changing one choice at a time.

    python experiments/benchmarks/recipes.py

The benchmark runs `fit` on the standard library for every change in `CHANGES`, with the same three seeds, and writes
`recipes.md` next to this file. Two runs execute in parallel, each with half of the cores. This does not affect
losses; it affects speeds, which are not reported.
"""

import argparse
import json
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fitting import launch

SEEDS = range(3)
DEFAULT = "default"
CHANGES: dict[str, list[str]] = {
    DEFAULT: [],
    "learning rate of embeddings and head 3e-3": ["--model.optimizer.adamw_lr=3e-3"],
    "Muon momentum 0.95": ["--model.optimizer.momentum=0.95"],
    "AdamW for everything": ["--model.optimizer=AdamW", "--model.optimizer.lr=5e-3"],
    "6 layers": ["--model.gpt.n_layer=6"],
    "switch: smear": ["--model.gpt.smear=true"],
    "switch: NorMuon": ["--model.optimizer.row_beta=0.95"],
    "switch: ReLU squared": ["--model.gpt.feed_forward=relu2"],
    "switch: value embeddings": ["--model.gpt.value_embeddings=true"],
    "switch: bigram embeddings, 8,192 rows": ["--model.gpt.bigram_rows=8192"],
    "switch: residual scalars": ["--model.gpt.residual_scalars=true"],
}


def run(flags: list[str], seed: int, steps: int, threads: int) -> dict[str, Any]:
    """Run `fit` and return the summary of the run."""
    with tempfile.TemporaryDirectory() as runs:
        launch(
            threads, f"--runs={runs}", f"--seed_everything={seed}", f"--trainer.max_steps={steps}",
            "--trainer.val_check_interval=1000000", *flags,
        )  # fmt: skip
        summary: dict[str, Any] = json.loads(next(Path(runs).rglob("summary.json")).read_text(encoding="utf-8"))
    print(f"{summary['val/bits_per_byte']:.4f}  {' '.join(flags) or 'the default'} (seed {seed})", flush=True)
    return summary


def main() -> None:
    """Run all rows and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=500, help="optimizer steps per run; fewer than in the default run, to save time"
    )
    given = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // 2)
    with ThreadPoolExecutor(2) as pool:
        running = {
            name: [pool.submit(run, flags, seed, given.steps, threads) for seed in SEEDS]
            for name, flags in CHANGES.items()
        }
    summaries = {name: [future.result() for future in futures] for name, futures in running.items()}
    bits = {name: [run["val/bits_per_byte"] for run in runs] for name, runs in summaries.items()}
    lines = [
        "# Effect of each choice of the default recipe",
        "",
        f"`python experiments/benchmarks/recipes.py --steps {given.steps}`: validation bits per byte on the standard "
        f"library of Python {platform.python_version()} after {given.steps} steps, one change per row, every row "
        f"with seeds {', '.join(map(str, SEEDS))}. `xz -9` needs {summaries[DEFAULT][0]['baselines']['xz']:.3f}. The "
        "gain is the mean over seeds of the default's value minus the row's, with its standard error; a gain below two "
        "standard errors is not conclusive. Text and split are the same for all.",
        "",
        f"| change | {' | '.join(f'seed {seed}' for seed in SEEDS)} | gain |",
        f"| --- |{' ---: |' * len(SEEDS)} ---: |",
    ]
    for name, values in bits.items():
        gains = [default - value for default, value in zip(bits[DEFAULT], values, strict=True)]
        error = stdev(gains) / len(gains) ** 0.5
        gain = "" if name == DEFAULT else f"{mean(gains):+.3f} ± {error:.3f}"
        figures = " | ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {name} | {figures} | {gain} |")
    table = "\n".join(lines) + "\n"
    Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
