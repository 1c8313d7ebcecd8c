"""Two processes on one machine train what one does. A new interpreter each, as a launcher needs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lit_gpt_scratch.checkpoint.loading import load_checkpoint

TOGETHER = ["--data.batch_size=2", "--trainer.devices=2", "--trainer.strategy=ddp"]


def fit(folder: Path, *flags: str) -> Path:
    """The folder of the one run that the flags make."""
    done = subprocess.run(
        [sys.executable, "-m", "lit_gpt_scratch.fit", *flags, f"--runs={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [run] = (folder / "pretrain").iterdir()
    return run


@pytest.mark.parametrize("more", [[], ["--data.packing=one_document", "--data.document_mask=true"]], ids=["", "uneven"])
def test_two_processes_train_as_one(small: list[str], tmp_path: Path, more: list[str]) -> None:
    """In ``uneven`` windows some ranks and micro-batches have fewer labels than others."""

    def losses(run: Path) -> dict[str, float]:
        summary: dict[str, float] = json.loads((run / "summary.json").read_text())
        return {name: summary[name] for name in ("train/loss", "val/loss", "val/bits_per_byte", "tokens", "step")}

    step = "--data.tokens_per_step=128"
    alone = losses(fit(tmp_path / "alone", *small, *more, "--data.batch_size=2", step))
    assert losses(fit(tmp_path / "together", *small, *more, *TOGETHER, step)) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("more", [[], ["--trainer.limit_val_batches=0"]])
def test_two_processes_stop_together_when_their_time_is_up(small: list[str], tmp_path: Path, more: list[str]) -> None:
    """Each has a clock of its own."""
    flags = [flag for flag in small if "max_steps" not in flag]
    limits = ["--trainer.max_time=00:00:00:02", "--checkpoint.every_minutes=0.005"]
    saved = load_checkpoint(fit(tmp_path, *flags, *TOGETHER, *limits, *more) / "checkpoints/last.ckpt")
    assert saved["global_step"] > 0
    assert not saved["callbacks"]["Checkpoints"]["stopped"]
