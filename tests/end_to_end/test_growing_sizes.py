"""Runs in which windows and steps grow: kills in each stage, several processes, other micro-batches, the plan."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_gpt_scratch.checkpoint.compare_checkpoints import compare_checkpoints
from lit_gpt_scratch.checkpoint.loading import load_checkpoint
from tests.end_to_end import forked
from tests.end_to_end.conftest import Command

GROWTH = [
    "--data.tokens_per_step=512", "--data.tokens_per_step_stages=[[0.25, 128], [0.5, 256]]",
    "--data.block_size_stages=[[0.25, 8]]", "--trainer.max_steps=16",
]  # fmt: skip
"""With 128 tokens per micro-batch: 8 steps of one micro-batch, 4 of two, and 4 of four."""
KILL = (
    "import os, lightning\n"
    "class Kill(lightning.Callback):\n"
    "    def on_train_batch_end(self, trainer, *_):\n"
    "        if trainer.fit_loop.total_batch_idx == int(os.environ['KILL_AT']): raise SystemExit(9)\n"
)


def last(experiment: str) -> dict[str, Any]:
    return load_checkpoint(Path(f"runs/{experiment}/version_0/checkpoints/last.ckpt"))


@pytest.fixture
def kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a callback that ends the process after the micro-batch ``KILL_AT``."""
    (tmp_path / "kill.py").write_text(KILL)
    monkeypatch.syspath_prepend(tmp_path)
    return ["--trainer.callbacks=kill.Kill", "--checkpoint.every_n_steps=1"]


def test_kills_in_each_stage_change_no_bit(
    command: Command, small: list[str], kill: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step, within a step of two micro-batches, and within one of four."""
    flags = [*small, *GROWTH, *kill, "--model.gpt.dropout=0.1", "--trainer.val_check_interval=5"]
    for experiment, kills in (("uninterrupted", []), ("killed", [3, 10, 18])):
        started: list[str] = []
        for micro_batch, code in [*((each, 9) for each in kills), (-1, 0)]:
            monkeypatch.setenv("KILL_AT", str(micro_batch))
            done = command("fit", *(started or flags), f"--experiment={experiment}")
            assert done.code == code, done.err
            started = ["--ckpt_path=last"]
    one, other = last("uninterrupted"), last("killed")
    assert one["global_step"] == 16
    assert not {name for name in compare_checkpoints(one, other) if not name.startswith("callbacks/Provenance")}


def test_two_processes_and_other_micro_batches_train_as_one(
    command: Command, small: list[str], kill: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In float64; packed documents of different lengths, so that ranks and micro-batches differ in their labels."""
    flags = [*small, *GROWTH, "--trainer.precision=64-true", "--data.packing=one_document"]
    flags += ["--trainer.limit_val_batches=0", "--model.optimizer=AdamW", "--model.gpt.initialisation=gpt2"]
    assert command("fit", *flags, "--experiment=alone").code == 0
    expected = last("alone")["state_dict"]
    done = forked.fit(
        tmp_path / "together", *flags, "--data.batch_size=2", "--trainer.devices=2", "--trainer.strategy=ddp"
    )
    assert done.code == 0, done.err
    [run] = (tmp_path / "together" / "pretrain").iterdir()
    monkeypatch.setenv("KILL_AT", "11")  # between two steps of two micro-batches
    assert command("fit", *flags, *kill, "--experiment=smaller").code == 9
    monkeypatch.setenv("KILL_AT", "-1")
    resumed = command("fit", "--ckpt_path=last", "--experiment=smaller", "--data.batch_size=2")
    assert resumed.code == 0, resumed.err
    for found in (load_checkpoint(run / "checkpoints/last.ckpt")["state_dict"], last("smaller")["state_dict"]):
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=0, atol=1e-9)


def test_stages_are_planned_saved_and_kept(command: Command, small: list[str]) -> None:
    planned = command("fit", *small, *GROWTH, "--plan")
    assert planned.code == 0, planned.err
    assert "tokens per window: 8 until 0.25 of the run, then 32" in planned.err
    assert "tokens per step: 128 until 0.25 of the run, 256 until 0.5 of the run, then 512" in planned.err
    assert "16 steps of 256 tokens on average: 4.1 k tokens" in planned.err
    predicted = command("fit", *small, *GROWTH, "--plan", "--devices_like=1xh100")
    assert predicted.code == 0, predicted.err
    assert "4 micro-batches per step: 512 tokens" in predicted.err
    assert "for 16 steps" not in predicted.err  # which are not all of that size
    assert command("fit", *small, *GROWTH).code == 0
    summary = json.loads(Path("runs/pretrain/version_0/summary.json").read_text())
    assert (summary["step"], summary["tokens"]) == (16, 16 * 256)
    config = Path("runs/pretrain/version_0/config.yaml").read_text()
    assert "block_size_stages:\n    - - 0.25\n      - 8\n" in config
    rejected = command("fit", "--ckpt_path=last", "--trainer.max_steps=20", "--data.block_size_stages=[[0.5, 8]]")
    assert rejected.code == 2
    assert "data.block_size_stages changed from [[0.25, 8]] to [[0.5, 8]]" in rejected.err
    again = command("fit", "--ckpt_path=last", "--trainer.max_steps=20")
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data.block_size_stages=[[0.5, 12]]"], "data.block_size_stages grows from 12 to 32"),
        (["--data.block_size_stages=[[0.5, 8.5]]"], "data.block_size_stages"),
        (["--data.tokens_per_step_stages=[[0.5, 128]]"], "data.tokens_per_step_stages requires data.tokens_per_step"),
        ([*GROWTH[:3], "--trainer.max_time=00:00:01:00"], "has no limit on steps or epochs"),
        ([*GROWTH[:3], "--budget=1min"], "--budget is 1min, but data.block_size_stages is also set"),
        (["--data=Conversations", "--data.block_size_stages=[[0.5, 8]]"], "block_size_stages"),
        ([*GROWTH[2:], "--model.gpt.multi_token_depth=8"], "data.block_size_stages begins with 8, so that no token"),
    ],
)
def test_mistakes_are_user_errors(command: Command, small: list[str], flags: list[str], expected: str) -> None:
    rejected = command("fit", *(flag for flag in small if "max_steps" not in flag), *flags)
    assert rejected.code == 2, rejected.err
    assert expected in rejected.err.splitlines()[-1]
    assert "Traceback" not in rejected.err
