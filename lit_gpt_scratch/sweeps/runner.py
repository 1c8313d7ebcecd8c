"""Doing the runs of a study, some side by side."""

import logging
import shutil
import signal
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps import hparams
from lit_gpt_scratch.sweeps.build_command import FIT, ResolvedBaseline, arguments, experiment
from lit_gpt_scratch.sweeps.run_process import RunProcess
from lit_gpt_scratch.sweeps.run_results import RunResult, curve, latest_run_folder, logged, read_run_result
from lit_gpt_scratch.sweeps.study import ClaimedRun, Study
from lit_gpt_scratch.sweeps.sweep_config import Sweep, nearest

log = logging.getLogger(__name__)

POLL = 0.1
"""Seconds between looks at a process."""
ASKED = [128 + signum for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
"""Exit codes of a run that was told to stop by somebody else: SLURM tells all processes of a job."""
LOOK = 1.0
"""Seconds between looks at the events of a run that may be pruned."""


class SweepRunner:
    """Takes one run after the other until there are none, in as many threads as runs may go side by side.

    Args:
        sweep: What is to be done.
        study: Who does what.
        folder: Of the sweep; a run is a folder in it.
        known: What ``fit`` says of the baseline.
        workers: Runs side by side.
        module: That runs are processes of.
    """

    def __init__(
        self, sweep: Sweep, study: Study, folder: Path, known: ResolvedBaseline, workers: int = 1, module: str = FIT
    ) -> None:
        self.sweep = sweep
        self.study = study
        self.folder = folder
        self.known = known
        self.workers = workers
        self.module = module
        self.stopping = threading.Event()
        """Set it, and every run saves and leaves, to be gone on with another time."""

    def run(self) -> None:
        """Do what there is to do.

        Raises:
            UserError: Nothing can come of the sweep.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            working = [pool.submit(self._work) for _ in range(self.workers)]
            try:
                wait(working, return_when=FIRST_EXCEPTION)
            finally:  # an exception is there, or a signal came
                if any(each.done() and each.exception() for each in working) or not all(w.done() for w in working):
                    self.stopping.set()
        for each in working:
            each.result()

    def _work(self) -> None:
        while not self.stopping.is_set() and (claim := self.study.claim()):
            try:
                run = self._run(claim)
            except BaseException:  # whatever it is: a run that is not done must not stay claimed
                self.study.give_back(claim)
                raise
            if run is None:
                self.study.give_back(claim)
                return
            self.study.record(claim, run)
            self._tell(claim, run)

    def _run(self, claim: ClaimedRun) -> RunResult | None:
        """Do a run, or go on with it, or find that it is done; None if the sweep is to stop."""
        given = arguments(self.sweep, claim.assignment, self.known)
        name = experiment(self.sweep, claim.assignment, given, claim.seed)
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        lock = FileLock(logs / f"{name}.lock")
        while not self.stopping.is_set():  # another sweep may be at the same run: an older form of the file, say
            with suppress(Timeout), lock.acquire(timeout=POLL):
                return self._alone(claim, given, name, logs / f"{name}.txt")
        return None

    def _alone(self, claim: ClaimedRun, given: list[str], name: str, said: Path) -> RunResult | None:
        runs = self.folder / name
        metric = self.sweep.metric
        where = [f"--seed_everything={claim.seed}", f"--runs={self.folder}", f"--experiment={name}"]
        state, reason = "finished", ""
        for attempt in ("go on", "anew"):
            folder = latest_run_folder(runs)
            if folder and (folder / "summary.json").is_file():
                break
            resumes = folder is not None and any(folder.glob("checkpoints/*.ckpt"))
            if folder and (attempt == "anew" or not resumes):
                shutil.rmtree(folder)
                resumes = False
            process = RunProcess(self.module, [*given, *where, "--ckpt_path=auto"], said, self.workers)
            pruned = self._watch(process, claim, runs)
            if self.stopping.is_set():
                return None
            if pruned:
                state, reason = "pruned", pruned
                break
            code = process.wait(0)
            if code == 0:
                break
            if code in ASKED:
                log.warning("%s was told to stop; so is the sweep", name)
                self.stopping.set()
                return None
            state, reason = "failed", process.reason()
            if not resumes:
                break
            state, reason = "finished", ""
        folder = latest_run_folder(runs)
        if folder is None:
            run = RunResult(claim.seed, state, reason, folder=str(runs))
        else:
            run = read_run_result(folder, claim.seed, metric, state, reason)
            if run.state == "finished" and metric not in run.metrics:
                names = logged(folder)
                raise UserError(f"metric: a run has no {metric}{nearest(metric, names)}; there are {', '.join(names)}")
        hparams.write(run, claim.assignment, f"trial {claim.number}")
        return run

    def _watch(self, process: RunProcess, claim: ClaimedRun, runs: Path) -> str:
        """Wait for a run's end, and end it early if it is to be; why it was pruned, if it was."""
        try:
            reported, looked = 0, time.monotonic()
            while process.wait(POLL) is None:
                if self.stopping.is_set():
                    process.stop()
                elif claim.trial is not None and time.monotonic() - looked > LOOK:
                    folder, looked = latest_run_folder(runs), time.monotonic()
                    for step, _, value in curve(folder, self.sweep.metric) if folder else ():
                        if step > reported:
                            reported = step
                            if self.study.should_prune(claim, step, value):
                                process.stop()
                                return f"{self.sweep.metric} was {value:.4g} at step {step}"
        finally:
            if process.wait(0) is None:  # an error on this side
                process.stop()
        return ""

    def _tell(self, claim: ClaimedRun, run: RunResult) -> None:
        value = run.metrics.get(self.sweep.metric)
        figure = "" if value is None else f"{self.sweep.metric} {value:.4f}, "
        why = f": {run.reason}" if run.reason else ""
        settings = ", ".join(f"{name} {setting}" for name, setting in claim.assignment.items())
        log.info("trial %d, seed %d: %s%s%s (%s)", claim.number, run.seed, figure, run.state, why, settings)
