"""Execute the runs of a study in parallel."""

import json
import logging
import shutil
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final, NamedTuple

from filelock import FileLock, Timeout

from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.distributed.stop_signals import STOP_SIGNALS
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.fit_command import FIT_MODULE, ResolvedBaseline, build_arguments, experiment_name
from lit_gpt_scratch.sweeps.run_process import RunProcess
from lit_gpt_scratch.sweeps.run_results import (
    RunResult,
    is_finished,
    latest_run_folder,
    logged_metrics,
    read_curve,
    read_run_result,
    write_hparams,
)
from lit_gpt_scratch.sweeps.scaling_report import predict_held_out
from lit_gpt_scratch.sweeps.study import ClaimedRun, Study, study_trials
from lit_gpt_scratch.sweeps.sweep_config import SweepConfig, suggest_closest
from lit_gpt_scratch.text.atomic_files import write_atomically

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
"""Interval in seconds at which the process of a run is polled."""
PRUNING_SECONDS = 1.0
"""Interval in seconds at which the event files of a run that may be pruned are read."""
INTERRUPTED_CODES = [128 + signum for signum in STOP_SIGNALS]
"""Exit codes of runs stopped by a signal from outside the sweep; SLURM, for example, signals all processes of a job."""
PREDICTION_FILE: Final = "prediction.json"
"""File in the sweep's folder that contains the prediction for the held-out trial."""
RETRY_DELAYS: Final = (1.0, 10.0)
"""Time in seconds before the first and the second retry of a run that failed because of its environment."""


class RunEnd(NamedTuple):
    """How a run, or one resumed segment of it, ended."""

    state: str = "finished"
    """``finished``, ``pruned`` or ``failed``."""
    reason: str = ""
    """Reason why the run did not finish."""
    retryable: bool = False
    """Whether the run failed because of its environment, and may succeed if it is repeated."""


class SweepRunner:
    """Runner that executes the runs of a study until no run is left to claim, with one thread per worker.

    Args:
        sweep: The parsed sweep file.
        study: Study that assigns runs and records their results.
        folder: Folder of the sweep, which contains one folder per run.
        baseline: All flags of the baseline, including the defaults of ``fit``.
        workers: Number of concurrent runs.
        module: Name of the Python module that each run executes.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        study: Study,
        folder: Path,
        baseline: ResolvedBaseline,
        workers: int = 1,
        module: str = FIT_MODULE,
    ) -> None:
        self.sweep = sweep
        self.study = study
        self.folder = folder
        self.baseline = baseline
        self.workers = workers
        self.module = module
        self.stopping = threading.Event()
        """Event that, when set, makes all runs save a checkpoint and exit; repeating the sweep resumes these runs."""

    def run(self) -> None:
        """Execute all remaining runs; a held-out trial starts after all others have ended and it has been predicted.

        Raises:
            UserError: The runs do not log the sweep's metric, or no scaling law can be fitted to them.
        """
        n_trials = self.sweep.n_trials
        if self.sweep.held_out is not None:
            self._run_trials(n_trials - 1)
            if self.stopping.is_set() or not self.study.have_ended(n_trials - 1):
                return  # another process is executing the last of these runs, or some are to be retried
            self._predict_held_out()
        self._run_trials(n_trials)

    def _predict_held_out(self) -> None:
        prediction = self.study.prediction
        if prediction is None:
            trials = study_trials(self.study, self.baseline)
            prediction = self.study.record_prediction(predict_held_out(self.sweep, trials))
        content = json.dumps(asdict(prediction), indent=2) + "\n"
        try:
            write_atomically(self.folder / PREDICTION_FILE, content)
        except OSError as error:
            raise UserError(f"cannot write {self.folder / PREDICTION_FILE}: {error.strerror}") from error
        log.info("predicted %s of the held-out trial: %s", self.sweep.metric, prediction.describe())

    def _run_trials(self, n_trials: int) -> None:
        """Execute the remaining runs of the first ``n_trials`` trials."""
        with ThreadPoolExecutor(self.workers) as pool:
            workers = [pool.submit(self._work, n_trials) for _ in range(self.workers)]
            try:
                wait(workers, return_when=FIRST_EXCEPTION)
            finally:  # a worker failed, or this thread was interrupted
                if any(each.done() and each.exception() for each in workers) or not all(w.done() for w in workers):
                    self.stopping.set()
        for each in workers:
            each.result()

    def _work(self, n_trials: int) -> None:
        while not self.stopping.is_set() and (claim := self.study.claim_run(n_trials)):
            try:
                result = self._run(claim)
            except BaseException:  # on any error: an unfinished run must not stay claimed
                self.study.release_run(claim)
                raise
            if result is None:
                self.study.release_run(claim)
                return
            self.study.record_run(claim, result)
            self._log_result(claim, result)

    def _run(self, claim: ClaimedRun) -> RunResult | None:
        """Execute or resume a run, or read its result if it has finished; return None if the sweep is stopping."""
        arguments = build_arguments(self.sweep, claim.assignment, self.baseline)
        name = experiment_name(self.sweep, claim.assignment, arguments, claim.seed)
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        lock = FileLock(logs / f"{name}.lock")
        while not self.stopping.is_set():  # a sweep with another version of the file may be executing this run
            with suppress(Timeout), lock.acquire(timeout=POLL_SECONDS):
                return self._run_locked(claim, arguments, name, logs / f"{name}.txt")
        return None

    def _run_locked(self, claim: ClaimedRun, arguments: list[str], name: str, output: Path) -> RunResult | None:
        experiment = self.folder / name
        metric = self.sweep.metric
        run_arguments = [
            *arguments,
            f"--seed_everything={claim.seed}",
            f"--runs={self.folder}",
            f"--experiment={name}",
        ]
        end = self._execute(claim, run_arguments, experiment, output)
        for delay in RETRY_DELAYS:
            if end is None or not end.retryable:
                break
            log.warning(
                "trial %d, seed %d: %s; the settings may not be the cause; retrying in %g s",
                claim.number, claim.seed, end.reason, delay,
            )  # fmt: skip
            end = None if self.stopping.wait(delay) else self._execute(claim, run_arguments, experiment, output)
        if end is None:
            return None
        folder = latest_run_folder(experiment)
        if folder is None:
            result = RunResult(claim.seed, end.state, end.reason, folder=str(experiment), retryable=end.retryable)
        else:
            result = read_run_result(folder, claim.seed, metric, *end)
            if result.state == "finished" and metric not in result.metrics:
                names = logged_metrics(folder)
                raise UserError(
                    f"metric: the runs do not log {metric}{suggest_closest(metric, names)}; logged metrics: "
                    f"{', '.join(names)}"
                )
        write_hparams(result, claim.assignment, f"trial {claim.number}")
        return result

    def _execute(self, claim: ClaimedRun, arguments: list[str], experiment: Path, output: Path) -> RunEnd | None:
        """Execute or resume a run; a run that fails after being resumed is repeated in a new folder.

        Returns:
            How the run ended, or None if the sweep is stopping.
        """
        for may_resume in (True, False):
            resumes, folder = False, latest_run_folder(experiment)
            if folder and str(folder) != claim.discarded:
                if is_finished(folder):
                    return RunEnd()
                if not RunFolder(folder).last_saved_at():
                    shutil.rmtree(folder)
                else:
                    resumes = may_resume
            try:
                resume = ["--ckpt_path=auto"] if resumes else []
                process = RunProcess(self.module, [*arguments, *resume], output, self.workers)
            except OSError as error:
                return RunEnd("failed", f"cannot start the run: {error}", retryable=True)
            pruned = self._watch(process, claim, experiment)
            if self.stopping.is_set():
                return None
            if pruned:
                return RunEnd("pruned", pruned)
            code = process.wait(0)
            folder = latest_run_folder(experiment)
            if code == 0 and folder and is_finished(folder):
                return RunEnd()
            if code == 0:
                return RunEnd("failed", f"the run wrote no summary to {experiment}", retryable=True)
            if code in INTERRUPTED_CODES:
                log.warning("%s received a termination signal; stopping the sweep", experiment.name)
                self.stopping.set()
                return None
            end = RunEnd("failed", process.failure_reason(), process.failed_by_environment)
            if end.retryable or not resumes or (folder and is_finished(folder)):
                break
        return end

    def _watch(self, process: RunProcess, claim: ClaimedRun, experiment: Path) -> str:
        """Wait for a run to end, and stop it if it is pruned or the sweep stops.

        Returns:
            The reason for pruning, or an empty string if the run was not pruned.
        """
        try:
            reported, checked = 0, time.monotonic()
            while process.wait(POLL_SECONDS) is None:
                if self.stopping.is_set():
                    process.stop()
                elif claim.trial is not None and time.monotonic() - checked > PRUNING_SECONDS:
                    folder, checked = latest_run_folder(experiment), time.monotonic()
                    for step, _, value in read_curve(folder, self.sweep.metric, growing=True) if folder else ():
                        if step > reported:
                            reported = step
                            if self.study.should_prune(claim, step, value):
                                process.stop()
                                return f"{self.sweep.metric} was {value:.4g} at step {step}"
        finally:
            if process.wait(0) is None:  # an exception was raised in this process
                process.stop()
        return ""

    def _log_result(self, claim: ClaimedRun, result: RunResult) -> None:
        value = result.metrics.get(self.sweep.metric)
        shown = "" if value is None else f"{self.sweep.metric} {value:.4f}, "
        reason = f": {result.reason}" if result.reason else ""
        settings = ", ".join(f"{name} {setting}" for name, setting in claim.assignment.items())
        log.info("trial %d, seed %d: %s%s%s (%s)", claim.number, result.seed, shown, result.state, reason, settings)
