"""Two processes on one machine train what one does. A new interpreter each, as a launcher needs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_two_processes_train_as_one(small: list[str], tmp_path: Path) -> None:
    def losses(runs: str, *flags: str) -> dict[str, float]:
        command = [sys.executable, "-m", "lit_gpt_scratch.fit", *small, "--data.batch_size=2", "--runs", runs, *flags]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=120,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        [run] = (tmp_path / runs / "pretrain").iterdir()
        summary: dict[str, float] = json.loads((run / "summary.json").read_text())
        return {name: summary[name] for name in ("train/loss", "val/loss", "val/bits_per_byte", "tokens", "step")}

    alone = losses("alone", "--data.tokens_per_step=128")
    together = losses("together", "--data.tokens_per_step=128", "--trainer.devices=2", "--trainer.strategy=ddp")
    assert together == pytest.approx(alone, rel=1e-5)
