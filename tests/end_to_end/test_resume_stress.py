"""A run killed at any moment and resumed ends with the weights and curves of an uninterrupted one, bit for bit."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_gpt_scratch.checkpoint.resume_stress_test import ResumeStressTest
from tests.end_to_end.conftest import STAGES

SHARDED = ["--trainer.strategy=fsdp2", "--checkpoint.format=sharded", "--checkpoint.background=true"]
CONFIGURATIONS = {
    "plain": [],
    "workers and accumulation": ["--data.num_workers=2", "--trainer.accumulate_grad_batches=4"],
    "epochs, average of weights": [
        "--model.ema_decay=0.9", "--trainer.limit_train_batches=9", "--trainer.val_check_interval=6",
        "--checkpoint.every_minutes=0.002", "--checkpoint.background=true", "--checkpoint.keep_best=2",
        "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/loss",
        "--trainer.callbacks.min_delta=0.1",
    ],
    "two processes": ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2"],
    "two processes, shards in the background": [*SHARDED, "--trainer.devices=2", "--data.batch_size=2"],
    "four processes, shards in the background": [*SHARDED, "--trainer.devices=4", "--data.batch_size=1"],
    "workers, average of weights by a callback, no validation": [
        "--data.num_workers=2", "--trainer.callbacks=EMAWeightAveraging", "--trainer.limit_val_batches=0",
    ],
}  # fmt: skip

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9")


def kill_and_compare(
    small: list[str], folder: Path, more: list[str], kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    aligned = any(f"--model={name}" in small for name in ("DPO", "PPO", "GRPO"))  # they use no dropout
    flags = [
        *small, f"--model.gpt.dropout={0.0 if aligned else 0.1}", "--trainer.max_steps=60",
        "--trainer.log_every_n_steps=2",
        "--checkpoint.every_n_steps=7", "--trainer.val_check_interval=20", "--inspect.every_n_steps=3", *more,
    ]  # fmt: skip
    report = ResumeStressTest(flags, folder, seed=kills).run(kills)
    print(f"{more}: {report}")
    assert report.kills.total() == kills
    assert report.bits > 1_000_000
    assert not report.differences, str(report)


@pytest.mark.slow
def test_killed_run_of_two_processes_equals_an_uninterrupted_one(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a single process is tested by the README's ``doctor --resume``."""
    kill_and_compare(small, tmp_path, CONFIGURATIONS["two processes"], 1, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_many_kills(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kills = 100 if "shards" in name else 40
    kill_and_compare(small, tmp_path, CONFIGURATIONS[name], kills, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_survives_kills(
    staged: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    kill_and_compare(staged(stage), tmp_path, [], 10, monkeypatch)
