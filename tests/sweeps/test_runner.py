"""The sweep command with a stub instead of ``fit``: kills, signals, several processes, failures, the report."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from optuna.trial import TrialState

from lit_gpt_scratch.sweeps import runner
from lit_gpt_scratch.sweeps.storage import open_storage
from lit_gpt_scratch.sweeps.study import Study
from lit_gpt_scratch.sweeps.sweep_config import load_sweep
from tests.sweeps.conftest import RunSweep, read_pids, read_rows
from tests.sweeps.stub_fit import METRIC, metric_of

Start = Callable[..., "subprocess.Popen[str]"]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_none_is_alive(started: dict[str, list[int]]) -> None:
    """A run notices within a second that its sweep is gone; on a busy machine it takes longer."""
    for pid in (pid for pids in started.values() for pid in pids):
        for _ in range(200):
            if not is_alive(pid):
                break
            time.sleep(0.05)
        assert not is_alive(pid)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [2, 20])
def test_sweep_survives_sigkill(tmp_path: Path, sweep_process: Start, kills: int) -> None:
    """No finished run is repeated or lost, no process survives, and the table has the stub's values."""
    options = list(range(1 + 3 * kills // 2))
    (tmp_path / "killed.yaml").write_text(f"fixed: {{seconds: 0.4}}\nvary: {{x: {options}}}\nseeds: [1, 2]\n")
    moments = random.Random(kills)
    runs = tmp_path / "runs"
    for _ in range(kills):
        sweep = sweep_process("killed.yaml", "--workers", "2")
        before = read_pids(runs, "killed")
        while read_pids(runs, "killed") == before and sweep.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.2))
        done = {path.parent.parent.name for path in (runs / "killed").glob("*/*/summary.json")}
        at_kill = read_pids(runs, "killed")
        assert sweep.poll() is None, sweep.communicate()[1]
        sweep.kill()
        sweep.communicate()
        assert_none_is_alive(read_pids(runs, "killed"))
        assert {
            name: pids for name, pids in read_pids(runs, "killed").items() if name in done
        }.items() <= at_kill.items()
    killed = sweep_process("killed.yaml", "--workers", "2")
    _, output = killed.communicate()
    assert killed.returncode == 0, output
    assert {name: read_pids(runs, "killed")[name] for name in done} == {name: at_kill[name] for name in done}
    found = [(row["x"], row["seed"], row["state"], float(row[METRIC])) for row in read_rows(runs, "killed")]
    assert found == [(str(x), str(seed), "finished", metric_of(x, "a", seed)) for x in options for seed in (1, 2)]


def test_two_processes_share_a_study(tmp_path: Path, sweep_process: Start) -> None:
    (tmp_path / "s.yaml").write_text("fixed: {seconds: 0.6}\nvary: {x: [1, 2, 3]}\nseeds: [1, 2]\n")
    both = [sweep_process("s.yaml", "--storage", "shared/journal", "--workers", "2") for _ in range(2)]
    outputs = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    started = read_pids(tmp_path / "runs", "s")
    assert len(started) == 6
    assert all(len(pids) == 1 for pids in started.values())
    assert sum(text.count("finished (") for text in outputs) == 6
    assert all("finished (" in text for text in outputs)


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_sweep_stops_on_a_signal(tmp_path: Path, sweep_process: Start, signum: signal.Signals) -> None:
    (tmp_path / "s.yaml").write_text("fixed: {seconds: 20}\nvary: {x: [1, 2]}\nseeds: [1]\n")
    sweep = sweep_process("s.yaml")
    while not read_pids(tmp_path / "runs", "s"):
        time.sleep(0.05)
    sweep.send_signal(signum)
    _, output = sweep.communicate(timeout=120)
    assert sweep.returncode == 128 + signum, output
    assert "repeat the command to resume" in output
    assert_none_is_alive(read_pids(tmp_path / "runs", "s"))
    assert (tmp_path / "runs" / "s" / "report.html").is_file()
    assert "1 unfinished trial;" in (tmp_path / "runs" / "s" / "report.md").read_text()


def test_failed_runs_are_recorded_and_do_not_stop_the_sweep(run_sweep: RunSweep, tmp_path: Path) -> None:
    """A failed seed does not stop the other seeds of its trial; bad settings are not tried again unasked."""
    text = "vary: {flags: {fine: {x: 1}, broken: {x: 2, fails: 1}}}\nseeds: [1, 2]\n"
    assert run_sweep(text) == 1
    table = read_rows(tmp_path / "runs", "s")
    assert [(row["flags"], row["seed"], row["state"]) for row in table] == [
        ("fine", "1", "finished"), ("fine", "2", "finished"), ("broken", "1", "failed"), ("broken", "2", "finished"),
    ]  # fmt: skip
    assert table[2]["reason"] == "this seed fails"
    report = (tmp_path / "runs" / "s" / "report.md").read_text()
    assert "| 1 | broken | 1 | failed | this seed fails |" in report
    assert "1 of 4 runs failed, in 1 of 2 trials. To repeat failed runs, add --retry failed to the command." in report
    started = read_pids(tmp_path / "runs", "s")
    assert run_sweep(text) == 1  # failed trials are not repeated
    assert read_pids(tmp_path / "runs", "s") == started


ENVIRONMENT = ("disk full", "disk full while writing", "text missing", "timeout", "worker killed")


@pytest.mark.parametrize(
    ("failure", "starts"),
    [
        ("killed", 3),
        ("user error", 1),
        ("crash", 1),
        *(pytest.param(failure, 3, marks=pytest.mark.slow) for failure in ENVIRONMENT),
        *(pytest.param(failure, 1, marks=pytest.mark.slow) for failure in ("settings", "bug")),
    ],
)
def test_only_failures_of_the_environment_are_retried(
    run_sweep: RunSweep, tmp_path: Path, capsys: pytest.CaptureFixture[str], failure: str, starts: int
) -> None:
    """A bounded number of times in each call; the next call executes the run again, once the cause is repaired."""
    text = f"fixed: {{fails: 1, failure: {failure}}}\nvary: {{x: [1]}}\nseeds: [1, 2]\n"
    assert run_sweep(text) == 1
    first, second = read_rows(tmp_path / "runs", "s")
    assert (first["state"], second["state"]) == ("failed", "finished")
    report = (tmp_path / "runs" / "s" / "report.md").read_text()
    assert "1 of 2 runs failed, in 1 of 1 trials." in report
    assert sorted(map(len, read_pids(tmp_path / "runs", "s").values())) == sorted([starts, 1])
    errors = capsys.readouterr().err
    assert errors.count("retrying in") == starts - 1
    (tmp_path / "repaired").touch()
    assert run_sweep(text) == (0 if starts > 1 else 1)
    states = [row["state"] for row in read_rows(tmp_path / "runs", "s")]
    assert states == ["finished" if starts > 1 else "failed", "finished"]
    assert ("run the command again to retry" in report) == (starts > 1)
    assert sorted(map(len, read_pids(tmp_path / "runs", "s").values())) == sorted([starts + (starts > 1), 1])


@pytest.mark.parametrize("how", ["fails", "guard_stops"])
def test_retry_failed(run_sweep: RunSweep, tmp_path: Path, how: str) -> None:
    """Failed runs start over in a new folder, even if they wrote a summary; finished runs are kept."""
    text = f"fixed: {{{how}: 2}}\nvary: {{x: [1, 2]}}\nseeds: [1, 2]\nmethod: grid\n"
    assert run_sweep(text) == 1
    rows = read_rows(tmp_path / "runs", "s")
    assert [row["state"] for row in rows] == ["finished", "failed"] * 2
    assert run_sweep(text, "--retry", "failed") == 1
    started = read_pids(tmp_path / "runs", "s")
    assert {name: len(pids) for name, pids in started.items()} == {n: 2 if "seed_2" in n else 1 for n in started}
    (tmp_path / "repaired").touch()
    assert run_sweep(text, "--retry", "failed") == 0
    rows = read_rows(tmp_path / "runs", "s")
    assert [(row["state"], float(row[METRIC])) for row in rows] == [
        ("finished", metric_of(x, "a", seed)) for x in (1, 2) for seed in (1, 2)
    ]
    assert run_sweep(text, "--retry", "failed") == 0
    assert sorted(map(len, read_pids(tmp_path / "runs", "s").values())) == [1, 1, 3, 3]


def test_run_stopped_by_the_guard_is_failed_and_not_retried(run_sweep: RunSweep, tmp_path: Path) -> None:
    assert run_sweep("fixed: {guard_stops: 1}\nvary: {x: [1]}\nseeds: [1]\n") == 1
    [row] = read_rows(tmp_path / "runs", "s")
    assert row["state"] == "failed"
    assert "guard" in row["reason"]
    assert [len(pids) for pids in read_pids(tmp_path / "runs", "s").values()] == [1]
    # As after a kill of the sweep between the end of the run and the record of its result.
    (tmp_path / "runs" / "s" / "study.journal").unlink()
    assert run_sweep("fixed: {guard_stops: 1}\nvary: {x: [1]}\nseeds: [1]\n") == 1
    assert [len(pids) for pids in read_pids(tmp_path / "runs", "s").values()] == [1]


def test_sweep_retries_a_run_that_cannot_be_started(
    run_sweep: RunSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output file cannot be opened, as on a full disk."""
    real, calls = runner.RunProcess, []

    def start(*args: object) -> runner.RunProcess:
        calls.append(args)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(*args)  # type: ignore[arg-type]  # passed on unchanged

    monkeypatch.setattr(runner, "RunProcess", start)
    assert run_sweep("vary: {x: [1]}\nseeds: [1]\n") == 0
    assert len(calls) == 2
    assert [row["state"] for row in read_rows(tmp_path / "runs", "s")] == ["finished"]


def test_unknown_metric(run_sweep: RunSweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep("vary: {x: [1, 2]}\nmetric: val/los\n") == 2
    *_, message = capsys.readouterr().err.splitlines()
    assert message.startswith(
        "error: metric: the runs do not log val/los; the closest match is val/loss; logged metrics: val/bits_per_byte,"
    )
    assert sum(map(len, read_pids(tmp_path / "runs", "s").values())) == 1
    assert run_sweep("vary: {x: [1, 2]}\nmetric: val/loss\n") == 0
    assert all(len(pids) == 1 for pids in read_pids(tmp_path / "runs", "s").values())  # the finished run is reused


def test_pruning_stops_a_bad_trial(run_sweep: RunSweep, tmp_path: Path) -> None:
    text = (
        "fixed: {seconds: 4}\nvary: {x: [3, 9]}\nseeds: [1]\n"
        "pruning: {MedianPruner: {n_startup_trials: 1, n_warmup_steps: 0}}\n"
    )
    assert run_sweep(text) == 0
    good, bad = read_rows(tmp_path / "runs", "s")
    assert (good["state"], bad["state"]) == ("finished", "pruned")
    assert bad["reason"].startswith("val/bits_per_byte was 4")
    sweep = load_sweep(Path("s.yaml"))
    study = Study(sweep, *open_storage(None, tmp_path / "runs" / "s", "s"))
    trial = study.trials()[1]
    assert trial.state == TrialState.PRUNED
    assert 1 <= max(trial.intermediate_values) < 5


def test_signal_to_a_run_stops_the_sweep(tmp_path: Path, sweep_process: Start) -> None:
    """SLURM signals all processes of a job; a run that was signalled has not failed."""
    (tmp_path / "s.yaml").write_text("fixed: {seconds: 20}\nvary: {x: [1, 2]}\nseeds: [1]\n")
    sweep = sweep_process("s.yaml")
    while not (started := read_pids(tmp_path / "runs", "s")):
        time.sleep(0.05)
    [[pid]] = started.values()
    time.sleep(0.3)
    os.kill(pid, signal.SIGUSR1)  # the stub exits with 138, as fit does
    _, output = sweep.communicate(timeout=120)
    assert sweep.returncode == 128 + signal.SIGTERM, output
    assert read_rows(tmp_path / "runs", "s") == []


@pytest.mark.slow
def test_two_sweeps_execute_a_shared_run_once(tmp_path: Path, sweep_process: Start) -> None:
    """The sweep file gains a value while the first version is still running."""
    text = "fixed: {{seconds: 1.5}}\nvary: {{x: {}}}\nseeds: [1]\n"
    (tmp_path / "s.yaml").write_text(text.format([1]))
    first = sweep_process("s.yaml")
    while not read_pids(tmp_path / "runs", "s"):
        time.sleep(0.02)
    (tmp_path / "s.yaml").write_text(text.format([1, 2]))
    second = sweep_process("s.yaml", "--storage", "other.journal")
    outputs = [process.communicate()[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert sorted(len(pids) for pids in read_pids(tmp_path / "runs", "s").values()) == [1, 1]
    assert [row["state"] for row in read_rows(tmp_path / "runs", "s")] == ["finished", "finished"]
