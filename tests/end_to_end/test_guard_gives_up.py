"""A run that the spike guard gives up fails: for the shell, in ``summary.json``, and in a sweep."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command

ABSURD = "1e30"
"""A learning rate after which no loss is finite."""
FLAGS = ["--guard=act", "--trainer.max_steps=260", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=100"]


def flags_of(small: list[str]) -> list[str]:
    return ["--model.optimizer=AdamW", *small, *FLAGS]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_exit_code_and_summary(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def fit(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lit_gpt_scratch.fit", *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    more = ["--trainer.devices=2", "--trainer.strategy=ddp"] if ranks > 1 else []
    done = fit(*flags_of(small), f"--model.optimizer.lr={ABSURD}", *more)
    assert done.returncode == 3, done.stderr
    assert "200 consecutive steps were skipped; stopping the run" in done.stderr
    assert "Traceback" not in done.stderr
    assert "lit_gpt_scratch.doctor runs/pretrain/version_0" in done.stderr
    assert "--force" not in done.stderr  # the same flags would fail again
    run = tmp_path / "runs/pretrain/version_0"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped"] == "guard"
    assert 200 <= summary["step"] < 260
    assert (run / "checkpoints/last.ckpt").exists()
    again = fit("--ckpt_path=last")
    assert again.returncode == 2
    assert "stopped early by a callback" in again.stderr


@pytest.mark.slow
def test_a_sweep_counts_the_run_as_failed(
    command: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    fixed = "".join(f"  {flag.removeprefix('--').replace('=', ': ')}\n" for flag in flags_of(small))
    Path("rates.yaml").write_text(
        f"fixed:\n{fixed}vary: {{model.optimizer.lr: [1e-3, {ABSURD}]}}\nseeds: [1]\nmetric: val/loss\n"
    )
    done = command("sweep", "rates.yaml")
    assert done.code == 1, done.err
    with (tmp_path / "runs/rates/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished", "failed"]
    assert "--guard act stopped the run" in rows[1]["reason"]
    assert "retrying" not in done.err
    summaries = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/rates/*/version_0/summary.json"))]
    assert sorted(str(summary.get("stopped")) for summary in summaries) == ["None", "guard"]
