"""Commands whose standard output or standard error is closed, full, or a pipe that nobody reads any more."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest

from lit_gpt_scratch.checkpoint.checkpoint_io import verify_checksum
from tests.end_to_end.conftest import Command, Trained

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
CONDITIONS = ("closed", "full", "pipe")
RUN = Path("runs/pretrain/version_0")
FILES_LAST = ("checkpoints/last.ckpt", "summary.json", "config.yaml", "tokenizer.json")


@contextmanager
def stream(condition: str) -> Iterator[TextIO | None]:
    if condition == "closed":
        yield None
    elif condition == "full":
        with Path("/dev/full").open("w", encoding="utf-8") as file:
            yield file
    else:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w", encoding="utf-8") as file:
            yield file


def commands(small: list[str]) -> dict[str, list[str]]:
    store = [flag for flag in small if flag.startswith("--data.")]
    source = next(flag.partition("=")[2] for flag in small if flag.startswith("--data.source="))
    return {
        "generate": ["--prompt", "the", "--max_new_tokens", "3"],
        "evaluate": [f"--data.source={source}", "--json"],
        "doctor": [str(RUN)],
        "prepare": [*store, "--show=1"],
    }


@pytest.mark.parametrize("name", ["generate", "evaluate", "doctor", "prepare"])
def test_results_that_cannot_be_written(
    command: Command, trained: Trained, small: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trained(*small)
    args = commands(small)[name]
    for condition in CONDITIONS:
        with stream(condition) as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            done = command(name, *args)
        assert done.code == (141 if condition == "pipe" else 2), done.err
        assert "Traceback" not in done.err
        errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert [line[:38] for line in errors] == ["error: cannot write to standard output"] * (condition != "pipe")
    with stream("pipe") as err, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", err)
        done = command(name, *args)
    assert (done.code, bool(done.out)) == (0, True)


def test_evaluation_results_are_saved_before_they_are_printed(
    command: Command, trained: Trained, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(*small)
    with stream("full") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert command("evaluate", *commands(small)["evaluate"]).code == 2
    assert list(RUN.glob("evaluations/*.json"))


@pytest.mark.parametrize(("out_is", "err_is"), [("closed", "pipe"), ("full", "full")])
def test_runs_continue_and_save(
    command: Command, small: list[str], monkeypatch: pytest.MonkeyPatch, out_is: str, err_is: str
) -> None:
    with stream(out_is) as out, stream(err_is) as err, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert command("fit", *small).code == 0
    assert all((RUN / name).is_file() for name in FILES_LAST)
    verify_checksum(RUN / "checkpoints/last.ckpt")


def test_sweeps_continue(command: Command, trained: Trained, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    trained(*small)
    with stream("full") as err, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", err)
        assert command("sweep", "--compare", RUN).code == 0
    assert Path("runs/comparison/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("redirected", [">&-", "2>&-", "> /dev/full", "2> /dev/full", "2>&1 | true", ">&- 2>&- <&-"])
@pytest.mark.parametrize("name", ["generate", "evaluate", "doctor", "prepare", "fit"])
def test_real_processes(trained: Trained, command: Command, small: list[str], name: str, redirected: str) -> None:
    """In new interpreters, which also flush at exit; ``true`` ends without reading."""
    trained(*small)
    arguments = {**commands(small), "fit": [*small, "--runs=own"]}[name]
    line = f"{sys.executable} -m lit_gpt_scratch.{name} {' '.join(arguments)} {redirected}"
    if "|" in redirected:
        line = f"{line}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if name == "fit":
        assert done.returncode == 0
        verify_checksum(Path("own/pretrain/version_0/checkpoints/last.ckpt"))
    else:
        lost = redirected not in ("2>&-", "2> /dev/full")
        assert done.returncode == ((141 if "|" in redirected else 2) if lost else 0), done.stderr


@pytest.mark.parametrize("signum", [signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])
def test_nohup_keeps_a_run_alive(
    command: Command, small: list[str], monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    """``nohup`` starts a process with SIGHUP ignored."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        monkeypatch.setattr("lit_gpt_scratch.callbacks.progress.RunProgressBar.on_validation_end", _hang_up)
        done = command("fit", *small)
    finally:
        assert signal.signal(signum, before) == signal.SIG_IGN
    assert done.code == 0, done.err


def _hang_up(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGHUP)
