"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end a run after the current step, with a checkpoint and the usual exit code."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lit_gpt_scratch.checkpoint.checkpoint_io import verify_checksum
from lit_gpt_scratch.checkpoint.resume_stress_test import list_group_processes
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.data import PackedText
from tests.end_to_end import forked
from tests.end_to_end.conftest import Command

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def fit(flags: list[str], folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "lit_gpt_scratch.fit", *flags, f"--runs={folder}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def stopped(small: list[str], folder: Path, signum: signal.Signals, seed: int, more: list[str], twice: bool) -> float:
    """Send a signal at a random moment after the first save; returns the seconds until the run ends."""
    rng = random.Random(seed)
    run = RunFolder(folder / "pretrain" / "version_0")
    process = fit([*small, "--trainer.max_steps=100000", "--checkpoint.every_n_steps=1000", *more], folder)
    while not run.last.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(rng.uniform(0.0, 1.0))  # some steps and validations later
    members = list_group_processes(process.pid)
    one = rng.choice(members) if more == TWO else process.pid  # loader workers are not ranks
    targets = rng.choice([[one], members])
    sent = time.monotonic()
    for pid in targets * (1 + twice):
        os.kill(pid, signum)
    out, stderr = process.communicate(timeout=120)
    took = time.monotonic() - sent
    assert process.returncode == 128 + signum, stderr
    assert out == ""
    assert "Traceback" not in stderr
    assert f"stopped by {signum.name} after step" in stderr
    verify_checksum(run.last)
    step = torch.load(run.last, weights_only=True)["global_step"]
    assert step > 0
    assert f"after step {step}; resume with: python -m lit_gpt_scratch.fit --ckpt_path {run.path}" in stderr
    again = forked.fit(folder, f"--ckpt_path={run.path}", f"--trainer.max_steps={step + 2}", *more)
    assert again.code == 0, again.err
    assert torch.load(run.last, weights_only=True)["global_step"] == step + 2
    return took


@pytest.mark.parametrize(
    ("signum", "more", "twice"),
    [
        (signal.SIGINT, [], True),
        pytest.param(signal.SIGTERM, TWO, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, ["--data.num_workers=2"], True, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, [], False, marks=pytest.mark.slow),  # quick below, without a step
    ],
)
def test_signal_ends_the_run_with_a_checkpoint(
    small: list[str], tmp_path: Path, signum: signal.Signals, more: list[str], twice: bool
) -> None:
    if signal.getsignal(signum) == signal.SIG_IGN:
        pytest.skip(f"{signum.name} is ignored, as under nohup")
    stopped(small, tmp_path, signum, 0, more, twice)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_signals(small: list[str], tmp_path: Path) -> None:
    times = [
        stopped(small, tmp_path / str(n), signal.SIGTERM, n, TWO if n % 2 else [], twice=n % 5 == 0) for n in range(50)
    ]
    print(f"seconds from the signal to the end: median {sorted(times)[25]:.2f}, greatest {max(times):.2f}")


@pytest.mark.slow
def test_signal_before_the_first_step_leaves_no_run_folder(small: list[str], tmp_path: Path) -> None:
    """Nothing was trained, so no folder is kept; there is no traceback."""
    # Under nohup, SIGHUP is ignored.
    signum = signal.SIGTERM if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else signal.SIGHUP
    process = fit([*small, "--trainer.max_steps=100000"], tmp_path / "runs")
    assert process.stderr
    line = process.stderr.readline()  # the first line is logged before training
    os.kill(process.pid, signum)
    _, stderr = process.communicate(timeout=60)
    if "stopped by" not in stderr:  # it may already have done its first steps
        assert process.returncode == 128 + signum, line + stderr
        assert not list(tmp_path.glob("runs/*/*"))
    assert "Traceback" not in stderr


def test_signal_that_library_code_swallows_stops_the_run(
    command: Command, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, Rust code that calls back into Python while it trains a tokenizer."""
    prepare = PackedText.prepare_data

    def prepare_data(self: PackedText) -> None:
        with contextlib.suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        prepare(self)

    monkeypatch.setattr(PackedText, "prepare_data", prepare_data)
    assert command("fit", *small).code == 128 + signal.SIGTERM
    assert not list(Path().glob("runs/*/*"))
    monkeypatch.setattr(PackedText, "prepare_data", prepare)
    assert command("fit", *small).code == 0
