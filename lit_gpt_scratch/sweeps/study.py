"""Optuna study of a sweep, which assigns runs to processes and records their results."""

import logging
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Final

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from lit_gpt_scratch.sweeps.fit_command import ResolvedBaseline, build_arguments
from lit_gpt_scratch.sweeps.locks import StudyLocks
from lit_gpt_scratch.sweeps.run_results import RunResult, TrialResult
from lit_gpt_scratch.sweeps.scaling_law import Prediction
from lit_gpt_scratch.sweeps.sweep_config import Assignment, SweepConfig

log = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 3
"""Number of environment failures after which a run is repeated only on request."""
BASELINE_ATTRIBUTE: Final = "known"
"""Name of the Optuna study attribute that stores the ``ResolvedBaseline``."""
PREDICTION_ATTRIBUTE: Final = "prediction"
"""Name of the Optuna study attribute that stores the ``Prediction`` of the held-out trial."""


@dataclass
class ClaimedRun:
    """A run that this process has locked for execution.

    Args:
        number: Trial number.
        assignment: Settings of the trial, keyed by the name of the search dimension.
        seed: Seed of the run.
        trial: Optuna trial to which the metric is reported during the run, or None if the run cannot be pruned.
        discarded: Folder of an earlier, failed execution that must not be resumed, or an empty string if there is none.
    """

    number: int
    assignment: Assignment
    seed: int
    trial: Trial | None
    discarded: str = ""

    @property
    def lock_name(self) -> str:
        """Name of the lock on the run."""
        return f"{self.number}_{self.seed}"


class Study:
    """Trials of a sweep, in a storage that several processes may share.

    A trial is one set of hyperparameter values, with one run per seed; processes claim runs, not trials. If a process
    is killed, Optuna still lists its trial as running, but the run's lock is released, so another process can claim and
    resume the run. A trial with a failed run is also listed as running, because failed runs can be repeated, but Optuna
    cannot reopen a trial that has ended. The next process repeats runs that failed because of their environment; other
    failed runs are repeated only with ``--retry failed``.

    Args:
        sweep: The parsed sweep file.
        storage: Optuna storage.
        locks: Locks that coordinate the processes working on the study.
    """

    def __init__(self, sweep: SweepConfig, storage: BaseStorage, locks: StudyLocks) -> None:
        self.sweep = sweep
        self.name = f"{sweep.name}-{sweep.fingerprint}"
        self._storage = storage
        self._locks = locks
        self._given_up: set[str] = set()  # lock names of runs that this process should not claim again
        self._study: optuna.Study | None = None
        if self.name in optuna.get_all_study_names(storage):
            self._study = optuna.load_study(study_name=self.name, storage=storage, pruner=sweep.build_pruner())

    @property
    def baseline(self) -> ResolvedBaseline | None:
        """Flags of the baseline as resolved by ``fit``, or None if the study has not been created yet."""
        plain = self._study.user_attrs.get(BASELINE_ATTRIBUTE) if self._study else None
        return ResolvedBaseline(**plain) if plain else None

    @property
    def prediction(self) -> Prediction | None:
        """Prediction of the held-out trial, or None if it has not been made."""
        plain = self._study.user_attrs.get(PREDICTION_ATTRIBUTE) if self._study else None
        return Prediction(**plain) if plain else None

    def record_prediction(self, prediction: Prediction) -> Prediction:
        """Store the prediction of the held-out trial, unless another process has done so, and return the stored one."""
        with self._locks.exclusive():
            if self.prediction is None:
                self.optuna_study.set_user_attr(PREDICTION_ATTRIBUTE, asdict(prediction))
            assert self.prediction is not None
            return self.prediction

    def create(self, baseline: ResolvedBaseline) -> None:
        """Create the study in the storage, or load it if another process has already created it."""
        pruner = self.sweep.build_pruner()
        with self._locks.exclusive():
            try:
                self._study = optuna.create_study(
                    study_name=self.name, storage=self._storage, direction=self.sweep.direction, pruner=pruner
                )
            except DuplicatedStudyError:
                self._study = optuna.load_study(study_name=self.name, storage=self._storage, pruner=pruner)
            self._study.set_user_attr(BASELINE_ATTRIBUTE, asdict(baseline))

    @property
    def optuna_study(self) -> optuna.Study:
        """Optuna study; ``create`` must be called first if the study was not found in the storage at construction."""
        assert self._study is not None, "call Study.create first"
        return self._study

    def trials(self) -> list[FrozenTrial]:
        """Return all trials of the study, or an empty list if the study has not been created yet."""
        return self.optuna_study.get_trials(deepcopy=False) if self._study else []

    @property
    def is_finished(self) -> bool:
        """Whether all trials of the sweep have been created and have ended."""
        return self.have_ended(max(self.sweep.n_trials, len(self.trials())))

    def have_ended(self, n_trials: int) -> bool:
        """Return whether the first ``n_trials`` trials have ended, successfully or not."""
        trials = self.trials()[:n_trials]
        return len(trials) == n_trials and all(
            trial.state.is_finished() or not self._missing_seeds(trial) for trial in trials
        )

    def claim_run(self, n_trials: int | None = None) -> ClaimedRun | None:
        """Claim the next available run for this process; return None if no run is available.

        Args:
            n_trials: Number of trials, starting with the first, whose runs may be claimed; all by default.
        """
        n_trials = self.sweep.n_trials if n_trials is None else n_trials
        with self._locks.exclusive():
            for trial in self.trials()[:n_trials]:
                if not trial.state.is_finished() and (claim := self._claim_run_of(trial)):
                    return claim
            number = len(self.trials())
            if number >= n_trials:
                return None
            self.optuna_study.sampler = self._build_sampler(number, "")
            number = self.optuna_study.ask().number
            return self._claim_run_of(self.trials()[number])

    def record_run(self, claim: ClaimedRun, result: RunResult) -> None:
        """Store the result of a run, release its lock, and end the trial if it has no remaining runs.

        A run that can be retried is not claimed again by this process. After ``MAX_ATTEMPTS``, it counts as failed.
        """
        with self._locks.exclusive():
            trial = self.trials()[claim.number]
            if result.retryable:
                self._given_up.add(claim.lock_name)
                earlier = recorded_runs(trial).get(claim.seed)
                attempts = 1 + (earlier.attempts if earlier else 0)
                result = replace(result, attempts=attempts, retryable=attempts < MAX_ATTEMPTS)
            self._storage.set_trial_user_attr(trial._trial_id, f"run_{claim.seed}", result.to_dict())
            self._locks.release(claim.lock_name)
            self._finish_if_complete(self.trials()[claim.number])

    def reset_failed_runs(self) -> int:
        """Discard the results of failed runs, so that they are executed again, and return their number."""
        count = 0
        with self._locks.exclusive():
            for trial in self.trials():
                failed = [run for run in recorded_runs(trial).values() if run.state == "failed" and not run.retryable]
                if failed and trial.state.is_finished():  # ended by an earlier version of this package
                    log.warning(
                        "trial %d cannot be retried; rename the sweep file to run all trials again", trial.number
                    )
                    continue
                for run in failed:
                    self._storage.set_trial_user_attr(trial._trial_id, f"run_{run.seed}", run.folder)
                count += len(failed)
        return count

    def release_run(self, claim: ClaimedRun) -> None:
        """Release the lock on a run without recording a result, so that another process can claim the run."""
        self._locks.release(claim.lock_name)

    def should_prune(self, claim: ClaimedRun, step: int, value: float) -> bool:
        """Report the metric at a step to the pruner, and return whether the run should be stopped."""
        if claim.trial is None:
            return False
        if step not in self.trials()[claim.number].intermediate_values:
            claim.trial.report(value, step)
        return claim.trial.should_prune()

    def _claim_run_of(self, trial: FrozenTrial) -> ClaimedRun | None:
        """Claim a run of an unfinished trial for this process; return None if no run is available."""
        if self._finish_if_complete(trial):
            return None
        missing = self._missing_seeds(trial)
        first = self.sweep.seeds[0]
        prunable = bool(self.sweep.pruning) and first in missing  # run the first seed alone
        for seed in [first] if prunable else missing:
            stored = trial.user_attrs.get(f"run_{seed}")
            claim = ClaimedRun(trial.number, {}, seed, None, stored if isinstance(stored, str) else "")
            if claim.lock_name not in self._given_up and self._locks.try_acquire(claim.lock_name):
                own_trial = Trial(self.optuna_study, trial._trial_id)
                claim.assignment = {name: self._suggest(own_trial, name) for name in self.sweep.vary}
                claim.trial = own_trial if prunable else None
                return claim
        return None

    def _finish_if_complete(self, trial: FrozenTrial) -> bool:
        """End a trial if all its runs have finished or a run was pruned; return whether no runs of the trial remain.

        A trial is not ended while another process is still executing one of its runs, or if one of its runs failed.
        """
        if self._missing_seeds(trial):
            return False
        recorded = recorded_runs(trial)
        states = {run.state for run in recorded.values()}
        for lock_name in (f"{trial.number}_{seed}" for seed in self.sweep.seeds if seed not in recorded):
            if not self._locks.try_acquire(lock_name):
                return False  # the process that holds the lock will end the trial
            self._locks.release(lock_name)
        if "pruned" in states:
            self.optuna_study.tell(trial.number, state=TrialState.PRUNED)
        elif "failed" not in states:
            value = fmean(run.metrics[self.sweep.metric] for run in recorded.values())
            self.optuna_study.tell(trial.number, value)
        return True

    def _missing_seeds(self, trial: FrozenTrial) -> list[int]:
        """Return the seeds of the runs that remain to be executed, or an empty list if a run was pruned."""
        recorded = recorded_runs(trial)
        if any(run.state == "pruned" for run in recorded.values()):
            return []
        return [seed for seed in self.sweep.seeds if seed not in recorded or recorded[seed].retryable]

    def _suggest(self, trial: Trial, name: str) -> Any:
        """Return a trial's setting in a search dimension, sampling it if it is not stored yet."""
        self.optuna_study.sampler = self._build_sampler(trial.number, name)
        space = self.sweep.vary[name].distribution
        if isinstance(space, CategoricalDistribution):
            return trial.suggest_categorical(name, space.choices)
        if isinstance(space, IntDistribution):
            return trial.suggest_int(name, space.low, space.high, step=space.step, log=space.log)
        assert isinstance(space, FloatDistribution)
        return trial.suggest_float(name, space.low, space.high, step=space.step, log=space.log)

    def _build_sampler(self, number: int, name: str) -> BaseSampler:
        """Build the sampler for a search dimension in a trial.

        Its seed depends only on the sweep, the trial and the dimension, so all processes sample the same settings.
        """
        seed = zlib.crc32(f"{self.sweep.fingerprint} {number} {name}".encode())
        predefined = self.sweep.predefined_assignments
        with warnings.catch_warnings():
            # PartialFixedSampler and constant_liar have been experimental since 2021. There is no other way to fix an
            # entire assignment, or to prevent concurrent processes from sampling the same point.
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler: BaseSampler = RandomSampler(seed=seed)
            if self.sweep.method == "tpe":
                sampler = TPESampler(seed=seed, constant_liar=True)
            return PartialFixedSampler(predefined[number], sampler) if number < len(predefined) else sampler


def recorded_runs(trial: FrozenTrial) -> dict[int, RunResult]:
    """Return the recorded results of a trial's runs, keyed by seed.

    Discarded results are omitted; only the paths of their run folders are stored.
    """
    attributes: Mapping[str, Any] = trial.user_attrs
    results = [plain for name, plain in attributes.items() if name.startswith("run_") and isinstance(plain, Mapping)]
    runs = [RunResult.from_dict(plain) for plain in results]
    return {run.seed: run for run in sorted(runs, key=lambda run: run.seed)}


def study_trials(study: Study, baseline: ResolvedBaseline) -> list[TrialResult]:
    """Return the results of all trials of a study whose settings are known.

    Args:
        study: The study.
        baseline: All flags of its baseline.
    """
    found = []
    for trial in study.trials():
        if trial.params.keys() >= study.sweep.vary.keys():
            assignment: Assignment = {name: trial.params[name] for name in study.sweep.vary}
            flags = build_arguments(study.sweep, assignment, baseline)
            runs = list(recorded_runs(trial).values())
            found.append(TrialResult(trial.number, assignment, runs, flags, expected_runs=len(study.sweep.seeds)))
    return found
