"""A sweep of real runs with a custom attention module, and the comparison of existing runs."""

import csv
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from tests.end_to_end.conftest import Command

CUSTOM_ATTENTION = '''
from lit_gpt_scratch.model.attention import Attention


class HalvedAttention(Attention):
    """Attention whose output is halved."""

    def attend(self, *args):
        return super().attend(*args) / 2
'''


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as rows:
        return list(csv.DictReader(rows))


@pytest.mark.slow
def test_custom_attention(command: Command, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One Python file and one sweep file, both outside the package."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    (tmp_path / "my_attention.py").write_text(CUSTOM_ATTENTION)
    fixed = "".join(f"  {flag.removeprefix('--').replace('=', ': ')}\n" for flag in small)
    (tmp_path / "halved.yaml").write_text(
        f"# Is halved attention as good?\nfixed:\n{fixed}  data.tokens_per_step: 128\n"
        "vary:\n  model.gpt.attention: [null, my_attention.HalvedAttention]\nseeds: [1]\nmetric: val/loss\n"
    )
    # As a user runs it; the process must not import torch, which takes seconds.
    script = (
        "import runpy, sys; sys.argv[1:] = ['halved.yaml', '--workers', '2']; "
        "runpy.run_module('lit_gpt_scratch.sweep', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "halved"
    default, custom = table(folder / "results.csv")
    assert (default["state"], custom["state"]) == ("finished", "finished")
    assert custom["model.gpt.attention"] == "my_attention.HalvedAttention"
    assert float(default["val/loss"]) != float(custom["val/loss"])
    report = (folder / "report.md").read_text()
    assert "Is halved attention as good?" in report
    assert "--model.gpt.attention=my_attention.HalvedAttention --seed_everything=1" in report or float(
        default["val/loss"]
    ) < float(custom["val/loss"])
    assert "curves_over_tokens.svg" in report
    assert "torch" in report
    outcome = command("sweep", "--compare", folder, "--metric", "val/loss", "--runs", "elsewhere")
    assert outcome.code == 0, outcome.err
    compared = table(tmp_path / "elsewhere" / "comparison" / "results.csv")
    assert {row["model.gpt.attention"]: row["val/loss"] for row in compared} == {
        row["model.gpt.attention"]: row["val/loss"] for row in (default, custom)
    }
    outcome = command("sweep", "--compare", folder, "--metric", "val/los")
    assert outcome.code == 2
    assert "does not log val/los; the closest match is val/loss" in outcome.err


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_runs_resume_to_the_same_table(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of fit that a kill of the sweep interrupts resume from their checkpoints, with bit-identical results."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    flags = [*small, "--checkpoint.every_n_steps=5"]
    fixed = "".join(f"  {flag.removeprefix('--').replace('=', ': ')}\n" for flag in flags if "max_steps" not in flag)
    text = f"fixed:\n{fixed}vary:\n  model.gpt.position: [rotary, none]\nseeds: [1]\nbudget: {{steps: 400}}\n"
    for name in ("undisturbed", "killed"):
        (tmp_path / f"{name}.yaml").write_text(text)

    def sweep(name: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "lit_gpt_scratch.sweep", f"{name}.yaml", "--workers", "2"]
        return subprocess.Popen(command, cwd=tmp_path)

    assert sweep("undisturbed").wait() == 0
    resumed, moments = set(), random.Random(0)
    for _ in range(4):
        process = sweep("killed")
        before = set((tmp_path / "runs" / "killed").glob("*/version_0/events*"))
        while before == set((tmp_path / "runs" / "killed").glob("*/version_0/events*")) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(moments.uniform(0.0, 3.0))
        process.kill()
        process.wait()
        resumed |= set((tmp_path / "runs" / "killed").glob("*/version_0/checkpoints/last.ckpt"))
    assert resumed
    assert sweep("killed").wait() == 0
    tables = [table(tmp_path / "runs" / name / "results.csv") for name in ("undisturbed", "killed")]
    for row, other in zip(*tables, strict=True):
        for column in ("trial", "model.gpt.position", "seed", "state", "val/loss", "val/bits_per_byte", "tokens"):
            assert row[column] == other[column]


def test_missing_extra(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_gpt_scratch.cli.sweep.find_spec", lambda name: None if name == "optuna" else name)
    outcome = command("sweep", "s.yaml")
    assert (outcome.code, outcome.err) == (
        2,
        "error: sweep requires optuna; install with: python -m pip install -e '.[sweep]'\n",
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "pass either a sweep file"),
        (["no.yaml"], "cannot read no.yaml: No such file"),
        (["s.yaml", "--workers", "0"], "--workers is 0"),
        (["s.yaml", "--compare", "runs"], "pass either a sweep file, or run folders after --compare"),
        (["--compare", "runs"], "runs contains no finished run"),
        (
            ["s.yaml", "--storage", "postgresql://x@127.0.0.1:9/y"],
            "--storage: cannot reach postgresql://***@127.0.0.1:9",
        ),
        (["s.yaml", "--runz", "x"], "--runz"),
    ],
)
def test_user_errors(command: Command, tmp_path: Path, args: list[str], message: str) -> None:
    (tmp_path / "s.yaml").write_text("vary: {model.gpt.n_layer: [2]}\n")
    outcome = command("sweep", *args)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"s.yaml"}
