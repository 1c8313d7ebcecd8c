"""The door, with a stub in the place of ``fit``: kills, signals, several processes, failures, the report."""

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

from lit_gpt_scratch.cli import entrypoint
from lit_gpt_scratch.cli.sweep import main
from lit_gpt_scratch.sweeps.storage import open_storage
from lit_gpt_scratch.sweeps.study import Study
from lit_gpt_scratch.sweeps.sweep_config import load
from tests.sweeps.conftest import STUB, rows, starts
from tests.sweeps.stub_fit import METRIC, figure

Start = Callable[..., "subprocess.Popen[str]"]
Sweeping = Callable[..., int]


@pytest.fixture
def sweeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeping:
    """Run a sweep of the stub in this process, in an empty folder; the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))

    def run(text: str, *args: str) -> int:
        Path("s.yaml").write_text(text)
        try:
            entrypoint.run(lambda: main(["s.yaml", *args], module=STUB))
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    return run


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def none_is_left(begun: dict[str, list[int]]) -> None:
    """A run notices within a second that its sweep is gone, on a busy machine later."""
    for pid in (pid for pids in begun.values() for pid in pids):
        for _ in range(200):
            if not alive(pid):
                break
            time.sleep(0.05)
        assert not alive(pid)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_kill_9_of_the_sweep(tmp_path: Path, sweep_process: Start, kills: int) -> None:
    """No finished run is repeated, none is lost, nothing keeps running, and the table is what the stub computes."""
    options = list(range(1 + 3 * kills // 2))
    (tmp_path / "killed.yaml").write_text(f"fixed: {{seconds: 0.4}}\nvary: {{x: {options}}}\nseeds: [1, 2]\n")
    moments = random.Random(kills)
    runs = tmp_path / "runs"
    for _ in range(kills):
        sweep = sweep_process("killed.yaml", "--workers", "2")
        before = starts(runs, "killed")
        while starts(runs, "killed") == before and sweep.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.2))
        done = {path.parent.parent.name for path in (runs / "killed").glob("*/*/summary.json")}
        at_kill = starts(runs, "killed")
        assert sweep.poll() is None, sweep.communicate()[1]
        sweep.kill()
        sweep.communicate()
        none_is_left(starts(runs, "killed"))
        assert {name: pids for name, pids in starts(runs, "killed").items() if name in done}.items() <= at_kill.items()
    killed = sweep_process("killed.yaml", "--workers", "2")
    _, said = killed.communicate()
    assert killed.returncode == 0, said
    assert {name: starts(runs, "killed")[name] for name in done} == {name: at_kill[name] for name in done}
    found = [(row["x"], row["seed"], row["state"], float(row[METRIC])) for row in rows(runs, "killed")]
    assert found == [(str(x), str(seed), "finished", figure(x, "a", seed)) for x in options for seed in (1, 2)]


def test_two_processes_on_one_study(tmp_path: Path, sweep_process: Start) -> None:
    (tmp_path / "s.yaml").write_text("fixed: {seconds: 0.6}\nvary: {x: [1, 2, 3]}\nseeds: [1, 2]\n")
    both = [sweep_process("s.yaml", "--storage", "shared/journal", "--workers", "2") for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    begun = starts(tmp_path / "runs", "s")
    assert len(begun) == 6
    assert all(len(pids) == 1 for pids in begun.values())
    assert sum(text.count("finished (") for text in said) == 6
    assert all("finished (" in text for text in said)


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_sweep_that_is_told_to_stop_goes_on_later(
    tmp_path: Path, sweep_process: Start, signum: signal.Signals
) -> None:
    (tmp_path / "s.yaml").write_text("fixed: {seconds: 20}\nvary: {x: [1, 2]}\nseeds: [1]\n")
    sweep = sweep_process("s.yaml")
    while not starts(tmp_path / "runs", "s"):
        time.sleep(0.05)
    sweep.send_signal(signum)
    _, said = sweep.communicate(timeout=30)
    assert sweep.returncode == 128 + signum, said
    assert "the same command goes on" in said
    none_is_left(starts(tmp_path / "runs", "s"))
    assert (tmp_path / "runs" / "s" / "report.html").is_file()
    assert "1 trials are not at their end" in (tmp_path / "runs" / "s" / "report.md").read_text()


def test_failures_are_recorded_and_disturb_nothing(sweeping: Sweeping, tmp_path: Path) -> None:
    text = "vary: {flags: {fine: {x: 1}, broken: {x: 2, fails: 1}}}\nseeds: [1, 2]\n"
    assert sweeping(text) == 0
    table = rows(tmp_path / "runs", "s")
    assert [(row["flags"], row["seed"], row["state"]) for row in table] == [
        ("fine", "1", "finished"), ("fine", "2", "finished"), ("broken", "1", "failed"),
    ]  # fmt: skip
    assert table[-1]["reason"] == "this seed fails"
    report = (tmp_path / "runs" / "s" / "report.md").read_text()
    assert "| 1 | broken | 1 | failed | this seed fails |" in report
    begun = starts(tmp_path / "runs", "s")
    assert sweeping(text) == 0  # a trial that failed has ended
    assert starts(tmp_path / "runs", "s") == begun


def test_a_metric_that_is_never_logged(sweeping: Sweeping, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweeping("vary: {x: [1, 2]}\nmetric: val/los\n") == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: metric: a run has no val/los; the nearest is val/loss; there are val/bits_per_byte,")
    assert sum(map(len, starts(tmp_path / "runs", "s").values())) == 1
    assert sweeping("vary: {x: [1, 2]}\nmetric: val/loss\n") == 0
    assert all(len(pids) == 1 for pids in starts(tmp_path / "runs", "s").values())  # the run that is there counts


def test_pruning_stops_a_bad_trial_early(sweeping: Sweeping, tmp_path: Path) -> None:
    text = (
        "fixed: {seconds: 4}\nvary: {x: [3, 9]}\nseeds: [1]\n"
        "pruning: {MedianPruner: {n_startup_trials: 1, n_warmup_steps: 0}}\n"
    )
    assert sweeping(text) == 0
    good, bad = rows(tmp_path / "runs", "s")
    assert (good["state"], bad["state"]) == ("finished", "pruned")
    assert bad["reason"].startswith("val/bits_per_byte was 4")
    sweep = load(Path("s.yaml"))
    study = Study(sweep, *open_storage(None, tmp_path / "runs" / "s", "s"))
    trial = study.trials()[1]
    assert trial.state == TrialState.PRUNED
    assert 1 <= max(trial.intermediate_values) < 5


def test_a_run_that_was_told_to_stop_stops_the_sweep(tmp_path: Path, sweep_process: Start) -> None:
    """SLURM tells all processes of a job; such a run has not failed."""
    (tmp_path / "s.yaml").write_text("fixed: {seconds: 20}\nvary: {x: [1, 2]}\nseeds: [1]\n")
    sweep = sweep_process("s.yaml")
    while not (begun := starts(tmp_path / "runs", "s")):
        time.sleep(0.05)
    [[pid]] = begun.values()
    time.sleep(0.3)
    os.kill(pid, signal.SIGUSR1)  # the stub leaves with 138, as fit does
    _, said = sweep.communicate(timeout=30)
    assert sweep.returncode == 128 + signal.SIGTERM, said
    assert rows(tmp_path / "runs", "s") == []


@pytest.mark.slow
def test_two_sweeps_with_a_run_in_common_do_it_once(tmp_path: Path, sweep_process: Start) -> None:
    """The file grew by a value while its first form was still at work."""
    text = "fixed: {{seconds: 1.5}}\nvary: {{x: {}}}\nseeds: [1]\n"
    (tmp_path / "s.yaml").write_text(text.format([1]))
    first = sweep_process("s.yaml")
    while not starts(tmp_path / "runs", "s"):
        time.sleep(0.02)
    (tmp_path / "s.yaml").write_text(text.format([1, 2]))
    second = sweep_process("s.yaml", "--storage", "other.journal")
    said = [process.communicate()[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert sorted(len(pids) for pids in starts(tmp_path / "runs", "s").values()) == [1, 1]
    assert [row["state"] for row in rows(tmp_path / "runs", "s")] == ["finished", "finished"]
