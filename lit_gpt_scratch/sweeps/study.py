"""The study: which run is to be done next, by whom, and what became of each. Search and storage are Optuna's."""

import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Final

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from lit_gpt_scratch.sweeps.build_command import ResolvedBaseline
from lit_gpt_scratch.sweeps.locks import StudyLocks
from lit_gpt_scratch.sweeps.run_results import RunResult
from lit_gpt_scratch.sweeps.sweep_config import Assignment, Sweep

KNOWN: Final = "known"
"""Attribute of the study: what ``fit`` says of its baseline."""


@dataclass
class ClaimedRun:
    """A run that is this process' to do.

    Args:
        number: Of its trial.
        assignment: What the trial sets.
        seed: The run's.
        trial: Optuna's, for reports by step; None for runs that have no part in pruning.
    """

    number: int
    assignment: Assignment
    seed: int
    trial: Trial | None

    @property
    def name(self) -> str:
        """Of its lock."""
        return f"{self.number}_{self.seed}"


class Study:
    """A sweep's trials, in a storage that other processes use, too.

    A trial is an assignment, and has a run for each seed; what is claimed is a run. A trial whose process was killed
    is still running as far as Optuna knows, but its lock is free, and so whoever comes next goes on with it.

    Args:
        sweep: What it is a study of.
        storage: Where it is kept.
        claims: The locks that go with it.
    """

    def __init__(self, sweep: Sweep, storage: BaseStorage, claims: StudyLocks) -> None:
        self.sweep = sweep
        self.name = f"{sweep.name}-{sweep.fingerprint}"
        self._storage = storage
        self._claims = claims
        self._study: optuna.Study | None = None
        if self.name in optuna.get_all_study_names(storage):
            self._study = optuna.load_study(study_name=self.name, storage=storage, pruner=sweep.pruner())

    @property
    def known(self) -> ResolvedBaseline | None:
        """What ``fit`` said of the baseline, or None if it has not been asked."""
        plain = self._study.user_attrs.get(KNOWN) if self._study else None
        return ResolvedBaseline(**plain) if plain else None

    def begin(self, known: ResolvedBaseline) -> None:
        """Make it, unless somebody has meanwhile."""
        with self._claims.alone():
            try:
                self._study = optuna.create_study(
                    study_name=self.name,
                    storage=self._storage,
                    direction=self.sweep.direction,
                    pruner=self.sweep.pruner(),
                )
            except DuplicatedStudyError:
                self._study = optuna.load_study(study_name=self.name, storage=self._storage, pruner=self.sweep.pruner())
            self._study.set_user_attr(KNOWN, asdict(known))

    @property
    def optuna(self) -> optuna.Study:
        """Optuna's."""
        assert self._study is not None, "begin comes first"
        return self._study

    def trials(self) -> list[FrozenTrial]:
        """All so far, as they are stored."""
        return self.optuna.get_trials(deepcopy=False) if self._study else []

    @property
    def over(self) -> bool:
        """Whether all trials are there and have ended."""
        trials = self.trials()
        return len(trials) >= self.sweep.n_trials and all(trial.state.is_finished() for trial in trials)

    def claim(self) -> ClaimedRun | None:
        """The next run that nobody does; None if there is none, though others may still be at theirs."""
        with self._claims.alone():
            for trial in self.trials():
                if not trial.state.is_finished() and (claim := self._claim_of(trial)):
                    return claim
            number = len(self.trials())
            if number >= self.sweep.n_trials:
                return None
            self.optuna.sampler = self._sampler(number, "")
            number = self.optuna.ask().number
            return self._claim_of(self.trials()[number])

    def record(self, claim: ClaimedRun, run: RunResult) -> None:
        """Store what became of a run, and end its trial if it was the last."""
        with self._claims.alone():
            trial = self.trials()[claim.number]
            self._storage.set_trial_user_attr(trial._trial_id, f"run_{claim.seed}", run.plain())
            self._claims.release(claim.name)
            self._settle(self.trials()[claim.number])

    def give_back(self, claim: ClaimedRun) -> None:
        """Leave a run to whoever comes next."""
        self._claims.release(claim.name)

    def should_prune(self, claim: ClaimedRun, step: int, value: float) -> bool:
        """Report a value of the run that pruning goes by, and ask."""
        if claim.trial is None:
            return False
        if step not in self.trials()[claim.number].intermediate_values:
            claim.trial.report(value, step)
        return claim.trial.should_prune()

    def _claim_of(self, trial: FrozenTrial) -> ClaimedRun | None:
        """A run of a trial that has not ended."""
        if self._settle(trial):
            return None
        recorded = runs_of(trial)
        missing = [seed for seed in self.sweep.seeds if seed not in recorded]
        if any(run.state != "finished" for run in recorded.values()):
            return None
        first = self.sweep.seeds[0]
        judged = bool(self.sweep.pruning) and first in missing
        for seed in [first] if judged else missing:
            claim = ClaimedRun(trial.number, {}, seed, None)
            if self._claims.take(claim.name):
                mine = Trial(self.optuna, trial._trial_id)
                claim.assignment = {name: self._suggest(mine, name) for name in self.sweep.vary}
                claim.trial = mine if judged else None
                return claim
        return None

    def _settle(self, trial: FrozenTrial) -> bool:
        """End a trial of which nothing is left to do, and nobody does anything."""
        recorded = runs_of(trial)
        missing = [seed for seed in self.sweep.seeds if seed not in recorded]
        ended = [run for run in recorded.values() if run.state != "finished"]
        if missing and not ended:
            return False
        for name in (f"{trial.number}_{seed}" for seed in missing):
            if not self._claims.take(name):
                return False  # who has it will settle the trial
            self._claims.release(name)
        if not ended:
            value = fmean(run.metrics[self.sweep.metric] for run in recorded.values())
            self.optuna.tell(trial.number, value)
        elif any(run.state == "failed" for run in ended):
            self.optuna.tell(trial.number, state=TrialState.FAIL)
        else:
            self.optuna.tell(trial.number, state=TrialState.PRUNED)
        return True

    def _suggest(self, trial: Trial, name: str) -> Any:
        """A setting; the one that is stored, if there is one."""
        self.optuna.sampler = self._sampler(trial.number, name)
        space = self.sweep.vary[name].distribution
        if isinstance(space, CategoricalDistribution):
            return trial.suggest_categorical(name, space.choices)
        if isinstance(space, IntDistribution):
            return trial.suggest_int(name, space.low, space.high, step=space.step, log=space.log)
        assert isinstance(space, FloatDistribution)
        return trial.suggest_float(name, space.low, space.high, step=space.step, log=space.log)

    def _sampler(self, number: int, name: str) -> BaseSampler:
        """Of one setting of one trial: what a trial draws does not depend on which process draws it, and when."""
        seed = zlib.crc32(f"{self.sweep.fingerprint} {number} {name}".encode())
        ahead = self.sweep.assignments
        with warnings.catch_warnings():
            # Both have been experimental since 2021; nothing else keeps several processes from trying the same
            # place at once, and nothing else says all of a trial.
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler: BaseSampler = RandomSampler(seed=seed)
            if self.sweep.method == "tpe":
                sampler = TPESampler(seed=seed, constant_liar=True)
            return PartialFixedSampler(ahead[number], sampler) if number < len(ahead) else sampler


def runs_of(trial: FrozenTrial) -> dict[int, RunResult]:
    """What is recorded of a trial, by seed."""
    stored: Mapping[str, Any] = trial.user_attrs
    runs = [RunResult.of(plain) for name, plain in stored.items() if name.startswith("run_")]
    return {run.seed: run for run in sorted(runs, key=lambda run: run.seed)}
