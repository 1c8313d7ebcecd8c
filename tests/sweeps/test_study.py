"""Assignment of runs to threads and processes, also after a process was killed."""

import threading
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from optuna.trial import TrialState

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.fit_command import ResolvedBaseline
from lit_gpt_scratch.sweeps.run_results import RunResult
from lit_gpt_scratch.sweeps.storage import JOURNAL, open_storage
from lit_gpt_scratch.sweeps.study import MAX_ATTEMPTS, ClaimedRun, Study
from lit_gpt_scratch.sweeps.sweep_config import SweepConfig, load_sweep

METRIC = "val/bits_per_byte"


def load_text(folder: Path, text: str) -> SweepConfig:
    path = folder / "s.yaml"
    path.write_text(text)
    return load_sweep(path)


def open_study(folder: Path, sweep: SweepConfig, storage: str | None = None) -> Study:
    """Open a study as another process would."""
    study = Study(sweep, *open_storage(storage, folder, sweep.name))
    study.create(ResolvedBaseline())
    return study


def result_of(claim: ClaimedRun, value: float = 1.0, **changes: str) -> RunResult:
    return RunResult(claim.seed, metrics={METRIC: value}, **changes)  # type: ignore[arg-type]  # strings


@pytest.mark.parametrize("storage", [None, "sqlite"])
def test_every_run_is_claimed_once(tmp_path: Path, storage: str | None) -> None:
    sweep = load_text(tmp_path, "vary: {a: [1, 2, 3], b: [x, y]}\n")
    where = f"sqlite:///{tmp_path}/study.db" if storage else None
    studies = [open_study(tmp_path, sweep, where) for _ in range(2)]
    claimed: list[tuple[int, int, str]] = []

    def work(study: Study) -> None:
        while claim := study.claim_run():
            claimed.append((claim.number, claim.seed, str(claim.assignment)))
            study.record_run(claim, result_of(claim))

    threads = [threading.Thread(target=work, args=[study]) for study in studies for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Counter(claimed).values()) == {1}
    assert {(number, seed) for number, seed, _ in claimed} == {(n, s) for n in range(6) for s in (1, 2, 3)}
    assert {assignment for *_, assignment in claimed} == {str(each) for each in sweep.predefined_assignments}
    assert studies[0].is_finished
    assert studies[1].is_finished


@pytest.mark.parametrize("method", ["grid", "random", "tpe"])
def test_run_of_a_killed_process_is_claimed_again_with_the_same_settings(tmp_path: Path, method: str) -> None:
    trials = "" if method == "grid" else "trials: 4\n"
    sweep = load_text(tmp_path, f"vary: {{a: [1, 2], b: [x, y]}}\nseeds: [1]\nmethod: {method}\n{trials}")
    killed, surviving = open_study(tmp_path, sweep), open_study(tmp_path, sweep)
    first, second = killed.claim_run(), killed.claim_run()
    assert first is not None
    assert second is not None
    assert first.assignment == sweep.baseline_assignment
    other = surviving.claim_run()
    assert other is not None
    assert other.number == 2
    killed.record_run(first, result_of(first))
    killed.release_run(second)  # as a kill does; Optuna still lists the trial as running
    again = surviving.claim_run()
    assert again is not None
    assert (again.number, again.assignment) == (second.number, second.assignment)


def test_random_search_does_not_depend_on_the_process(tmp_path: Path) -> None:
    text = "vary: {a: {low: 0.0, high: 1.0}, b: {low: 1, high: 100}}\nseeds: [1]\nmethod: random\ntrials: 6\n"
    drawn = []
    for name, processes in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        sweep = load_text(tmp_path / name, text)
        studies = [open_study(tmp_path / name, sweep) for _ in range(processes)]
        claims = [claim for n in range(6) if (claim := studies[n % processes].claim_run())]
        drawn.append([claim.assignment for claim in claims])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] == {"a": 0.5, "b": 50}
    assert len({str(each) for each in drawn[0]}) == 6


def test_tpe_concentrates_near_the_optimum(tmp_path: Path) -> None:
    sweep = load_text(tmp_path, "vary: {a: {low: 0.0, high: 10.0}}\nseeds: [1]\nmethod: tpe\ntrials: 40\n")
    study = open_study(tmp_path, sweep)
    tried = []
    while claim := study.claim_run():
        tried.append(float(claim.assignment["a"]))
        study.record_run(claim, result_of(claim, (tried[-1] - 7.0) ** 2))
    early, late = tried[1:11], tried[-10:]
    assert sum(abs(a - 7) for a in late) < 0.5 * sum(abs(a - 7) for a in early)


def test_trial_ends_after_its_last_run(tmp_path: Path) -> None:
    sweep = load_text(tmp_path, "vary: {a: [1, 2]}\nseeds: [1, 2]\n")
    study = open_study(tmp_path, sweep)
    one, two = study.claim_run(), study.claim_run()
    assert one is not None
    assert two is not None
    study.record_run(one, result_of(one, 1.0))
    assert study.trials()[0].state == TrialState.RUNNING
    study.record_run(two, result_of(two, 2.0))
    assert study.trials()[0].value == 1.5
    three, four = study.claim_run(), study.claim_run()
    assert three is not None
    assert four is not None
    study.record_run(three, result_of(three, state="failed", reason="no memory"))
    assert study.trials()[1].state == TrialState.RUNNING  # its other run is still executing
    study.record_run(four, result_of(four))
    assert study.trials()[1].state == TrialState.RUNNING  # Optuna could not reopen it for a retry
    assert study.claim_run() is None
    assert study.is_finished
    assert study.reset_failed_runs() == 1
    assert not study.is_finished
    retried = study.claim_run()
    assert retried is not None
    assert (retried.number, retried.seed, retried.assignment) == (1, 1, three.assignment)
    study.record_run(retried, result_of(retried, 3.0))
    assert study.trials()[1].value == 2.0


def test_run_that_can_be_retried_is_claimed_by_the_next_process(tmp_path: Path) -> None:
    sweep = load_text(tmp_path, "vary: {a: [1]}\nseeds: [1, 2]\n")
    study = open_study(tmp_path, sweep)
    killed = study.claim_run()
    assert killed is not None
    study.record_run(killed, RunResult(killed.seed, "failed", "killed by SIGKILL", retryable=True))
    other = study.claim_run()
    assert other is not None
    assert other.seed == 2
    study.record_run(other, result_of(other))
    assert study.claim_run() is None
    assert not study.is_finished
    assert study.reset_failed_runs() == 0
    study = open_study(tmp_path, sweep)
    again = study.claim_run()
    assert again is not None
    assert (again.seed, again.discarded) == (1, "")  # its folder is resumed
    study.record_run(again, result_of(again, 2.0))
    assert study.trials()[0].value == 1.5
    assert study.is_finished


def test_attempts_are_bounded(tmp_path: Path) -> None:
    """A setting that exhausts the memory looks like a failure of the environment; ``--retry failed`` starts over."""
    sweep = load_text(tmp_path, "vary: {a: [1]}\nseeds: [1]\n")

    def fail_until_given_up() -> int:
        for attempts in range(10):
            claim = (study := open_study(tmp_path, sweep)).claim_run()
            if claim is None:
                return attempts
            study.record_run(claim, RunResult(claim.seed, "failed", "killed by SIGKILL", retryable=True))
        return 10

    assert fail_until_given_up() == MAX_ATTEMPTS
    assert open_study(tmp_path, sweep).reset_failed_runs() == 1
    assert fail_until_given_up() == MAX_ATTEMPTS


def test_pruning_by_step(tmp_path: Path) -> None:
    sweep = load_text(tmp_path, "vary: {a: [1, 2, 3]}\nseeds: [1, 2]\npruning: {MedianPruner: {n_startup_trials: 1}}\n")
    study = open_study(tmp_path, sweep)
    first = study.claim_run()
    assert first is not None
    assert not any(study.should_prune(first, step, 1.0) for step in (10, 20))
    study.record_run(first, result_of(first))
    second = study.claim_run()
    assert second is not None
    assert (second.number, second.seed) == (0, 2)
    assert not study.should_prune(second, 10, 99.0)  # only the first seed can be pruned
    study.record_run(second, result_of(second))
    bad = study.claim_run()
    assert bad is not None
    assert study.claim_run() is not None  # of the third trial: the bad one's second seed waits
    assert study.should_prune(bad, 10, 5.0)
    study.record_run(bad, result_of(bad, 5.0, state="pruned"))
    assert study.trials()[1].state == TrialState.PRUNED
    assert study.trials()[1].intermediate_values == {10: 5.0}


def test_journal_with_a_half_written_last_line(tmp_path: Path) -> None:
    sweep = load_text(tmp_path, "vary: {a: [1, 2]}\nseeds: [1]\n")
    study = open_study(tmp_path, sweep)
    claim = study.claim_run()
    assert claim is not None
    study.record_run(claim, result_of(claim, 7.0))
    with (tmp_path / JOURNAL).open("a") as journal:
        journal.write('{"op_code": 5, "wor')
    study = open_study(tmp_path, sweep)
    after = study.claim_run()
    assert after is not None
    assert after.number == 1
    study.record_run(after, result_of(after))
    assert [trial.value for trial in open_study(tmp_path, sweep).trials()] == [7.0, 1.0]


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("postgresql://nobody:secret@127.0.0.1:9/none", "cannot reach postgresql://nobody:***@127.0.0.1:9/none"),
        ("oracle://x", "--storage is oracle://...; it must be"),
        ("postgresql://127.0.0.1:9/x?user=me&password=secret", "cannot reach postgresql://127.0.0.1:9/x: "),
        ("postgres://me@127.0.0.1:9/x?passfile=/home/secret", "cannot reach postgres://me@127.0.0.1:9/x: "),
        (
            "postgresql://127.0.0.1:9/x?sslkey=secret&sslcert=secret&y=secret",
            "cannot reach postgresql://127.0.0.1:9/x: ",
        ),
        ("postgresql://me:a@secret@127.0.0.1:9/x", "--storage is not a valid URL, because it contains several @"),
        ("postgresql://me:a@127.0.0.1:9/b@secret", "--storage is not a valid URL, because it contains several @"),
        ("postgresql://me:secret", "--storage is not a valid URL; use postgresql://USER:PASSWORD@HOST"),
        ("postgresql://me@host:secret/x", "--storage is not a valid URL"),
        ("postgresql:me:secret@host/x", "--storage is neither a file path nor a URL; use postgresql://"),
        ("postgresql:/me:secret@host/x", "--storage is neither a file path nor a URL"),
        ("mysql:me:secret@host/x", "--storage is neither a file path nor a URL"),
        ("host=db user=me password=secret", "--storage is neither a file path nor a URL"),
        ("me:secret@host://x", "--storage is invalid; it must be a file path"),
        ("sqlite:////proc/none/x.db", "--storage: cannot write to /proc/none/x.db: No such file"),
        ("/proc/none/journal", "--storage: cannot write to /proc/none/journal: No such file"),
    ],
)
def test_invalid_storage(tmp_path: Path, storage: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_storage(storage, tmp_path, "s")
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not list(tmp_path.iterdir())
