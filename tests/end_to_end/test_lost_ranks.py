"""A rank that is missing, stopped or hung is named, and a signal ends the processes that wait for it within seconds."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from lit_gpt_scratch.checkpoint.resume_stress_test import list_group_processes
from lit_gpt_scratch.checkpoint.run_folder import RunFolder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


@contextmanager
def fit(folder: Path, *flags: str, torchrun: int = 0, **environment: str) -> "Iterator[subprocess.Popen[str]]":
    """Start ``fit``, with torchrun if a number of processes is given; its processes are killed at the end."""
    launcher = ["torch.distributed.run", f"--nproc-per-node={torchrun}", f"--master-port={free_port()}", "-m"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", *(launcher if torchrun else ())),
            *("lit_gpt_scratch.fit", *flags, f"--runs={folder}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        yield process
    finally:
        for pid in list_group_processes(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def read_until(process: "subprocess.Popen[str]", word: str) -> str:
    """Read standard error up to the first line that contains a word."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if word in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def wait_for(run: RunFolder, process: "subprocess.Popen[str]") -> None:
    while not run.last.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_missing_machine_is_reported_and_a_signal_ends_the_wait(
    small: list[str], tmp_path: Path, signum: signal.Signals
) -> None:
    flags = [*small, "--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    with fit(tmp_path / "runs", *flags, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()) as process:
        read_until(process, "waiting up to 0:30:00 for some of the 2 processes on 2 machines")
        sent = time.monotonic()
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - sent < 10
        assert process.returncode == 128 + signum
        assert "Traceback" not in stderr
        assert f"stopped by {signum.name} while" in stderr
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.slow
def test_missing_machine_ends_the_run_after_the_timeout(small: list[str], tmp_path: Path) -> None:
    strategy = ["--trainer.strategy=DDPStrategy", "--trainer.strategy.timeout=0:00:15"]
    flags = [*small, "--trainer.num_nodes=2", "--trainer.devices=1", *strategy]
    with fit(tmp_path / "runs", *flags, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()) as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.splitlines()[-1].startswith("error: some of the 2 processes on 2 machines")
    assert "did not connect within 0:00:15" in stderr
    assert "Traceback" not in stderr
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("stopped", [0, 1])
def test_signal_ends_a_run_with_a_stopped_rank(small: list[str], tmp_path: Path, strategy: str, stopped: int) -> None:
    """The signal goes to the rank that still runs, and a stopped rank 0 does not leave the other rank behind."""
    run = RunFolder(tmp_path / "pretrain" / "version_0")
    flags = [*small, "--trainer.devices=2", f"--trainer.strategy={strategy}", "--trainer.max_steps=1000000"]
    with fit(tmp_path, *flags, "--checkpoint.every_n_steps=10") as process:
        wait_for(run, process)
        ranks = [process.pid, *(pid for pid in list_group_processes(process.pid) if pid != process.pid)]
        assert len(ranks) == 2
        os.kill(ranks[stopped], signal.SIGSTOP)
        time.sleep(2)
        os.kill(ranks[1 - stopped], signal.SIGTERM)
        sent = time.monotonic()
        stderr = read_until(process, "stopped by SIGTERM while it waited")
        assert f"while it waited for rank {stopped};" in stderr
        if stopped == 1:
            assert process.wait(20) == 128 + signal.SIGTERM
            while ranks[1] in list_group_processes(process.pid):  # killed, but still listed for a moment
                assert time.monotonic() - sent < 25
                time.sleep(0.05)
        assert time.monotonic() - sent < 25


MESSAGES = {
    "mistake": (2, r"error: rank {rank}: the file is invalid; repair it"),
    "full disk": (
        2,
        r"error: rank {rank}: No space left on device \(/data/file\); free disk space, or use another disk",
    ),
    "bug": (1, r"KeyError: 'no such thing'"),
    "killed": (2, r"error: rank \d: rank {rank} exited or stopped responding \(.*\); resume the run with .*"),
    "stopped": (2, r"error: rank \d: rank {rank} exited or stopped responding \(.*\); resume the run with .*"),
    "hangs": (2, r"error: rank \d: rank {rank} did not enter \w+ of .* \(.*timeout 0:00:40\); resume the run with .*"),
}
"""Exit code and message of a run in which one rank fails."""


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 2), ("fsdp2", 2), ("hsdp", 4)])
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
@pytest.mark.parametrize("kind", MESSAGES)
def test_failure_of_one_rank_is_one_message_and_one_exit_code(
    small: list[str], tmp_path: Path, kind: str, launcher: str, strategy: str, processes: int
) -> None:
    """Within the timeout of collective operations; a rank that is waited for is named, and there are flight records."""
    rank = processes - 1
    callback = ["--trainer.callbacks=tests.custom_callback.FailOnRank", f"--trainer.callbacks.rank={rank}"]
    layout = [f"--trainer.devices={processes}", f"--trainer.strategy={strategy}", "--collective_timeout=0:00:40"]
    layout += ["--hsdp_groups=2"] if strategy == "hsdp" else []
    flags = [*small, *layout, *callback, f"--trainer.callbacks.kind={kind}"]
    started = time.monotonic()
    with fit(tmp_path, *flags, torchrun=processes if launcher == "torchrun" else 0) as process:
        _, stderr = process.communicate(timeout=250)
    assert time.monotonic() - started < 200
    code, message = MESSAGES[kind]
    errors = [line for line in stderr.splitlines() if re.match(r"(error: |\w*Error: )", line)]
    assert len(errors) == 1, stderr
    assert re.fullmatch(message.format(rank=rank), errors[0]), stderr
    own, *of_torchrun = re.split(r"^E\d{4} ", stderr, maxsplit=1, flags=re.MULTILINE)
    assert ("Traceback" in own) == (kind == "bug")
    if launcher == "torchrun":  # which itself exits with 1
        found = re.search(r"failed \(exitcode: (-?\d+)\)", of_torchrun[0])
        assert found is not None
        assert int(found[1]) == (-signal.SIGKILL if kind == "killed" else code)
    else:
        assert process.returncode == code
    if kind in ("stopped", "hangs"):
        run = RunFolder(tmp_path / "pretrain" / "version_0").path
        records = {path.stem: json.loads(path.read_text()) for path in run.glob("flight_record/*.json")}
        waiting = {f"rank_{other}" for other in range(processes) if other != rank or kind == "hangs"}
        assert records.keys() == waiting
        assert all(records.values())
