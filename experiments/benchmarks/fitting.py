"""Run ``fit`` in a subprocess, for benchmarks with several stages."""

import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parents[1] / "finetune"


def fit(runs: Path, experiment: str, threads: int, *flags: str) -> tuple[Path, dict[str, Any]]:
    """Run `fit`, unless a finished run of the experiment exists; return the run folder and its summary.

    In the summary, ``wall`` is the duration of the whole process in seconds.
    """
    for done in (runs / experiment).glob("*/wall.json"):
        return done.parent, json.loads(done.read_text(encoding="utf-8"))
    began = time.perf_counter()
    launch(threads, *flags, f"--runs={runs}", f"--experiment={experiment}")
    path = max((runs / experiment).glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) | {"wall": time.perf_counter() - began}
    path.with_name("wall.json").write_text(json.dumps(summary), encoding="utf-8")
    return path.parent, summary


def launch(threads: int, *flags: str) -> None:
    """Run `fit` with the given flags; if it fails, exit with its error message."""
    outcome = subprocess.run(
        [sys.executable, "-m", "lit_gpt_scratch.fit", *flags],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if outcome.returncode:
        sys.exit(f"{' '.join(flags)} failed:\n{outcome.stderr[-2000:]}")


def quiet() -> None:
    """Hide log messages and warnings of Lightning."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
