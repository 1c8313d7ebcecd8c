"""The report of a sweep, from its study alone: runs may lie on other machines."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import optuna
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from lit_gpt_scratch.sweeps.build_command import ResolvedBaseline, arguments, text
from lit_gpt_scratch.sweeps.report import SweepReport
from lit_gpt_scratch.sweeps.search_space import Choices, NumericRange, SearchDimension
from lit_gpt_scratch.sweeps.study import Study, runs_of
from lit_gpt_scratch.sweeps.sweep_config import Sweep
from lit_gpt_scratch.sweeps.trial import TrialResult, format_setting

FEWEST = 4
"""Trials from which the importance of two parameters can be told apart at all."""


def build_study_report(study: Study, path: Path) -> SweepReport:
    """What a study has found so far.

    Args:
        study: With its sweep.
        path: Of the sweep file.
    """
    sweep, known = study.sweep, study.known or ResolvedBaseline()
    arms = [_arm(trial, sweep, known) for trial in study.trials() if trial.params.keys() >= sweep.vary.keys()]
    return SweepReport(
        title=sweep.name.replace("_", " ").capitalize(),
        question=sweep.question,
        metric=sweep.metric,
        direction=sweep.direction,
        arms=arms,
        baseline=next((arm for arm in arms if arm.assignment == sweep.first), None),
        setting=_setting(sweep),
        command=shlex.join(["python", "-m", "lit_gpt_scratch.sweep", str(path)]),
        importance=_importance(study),
    )


def _arm(trial: FrozenTrial, sweep: Sweep, known: ResolvedBaseline) -> TrialResult:
    assignment = {name: trial.params[name] for name in sweep.vary}
    runs = list(runs_of(trial).values())
    return TrialResult(trial.number, assignment, runs, arguments(sweep, assignment, known), len(sweep.seeds))


def _setting(sweep: Sweep) -> dict[str, str]:
    said = {name: _options(each) for name, each in sweep.vary.items()}
    said |= {"base": ", ".join(map(str, sweep.base)) or "the defaults of fit"}
    said |= {f"fixed: {name}": text(value) for name, value in sweep.fixed.items()}
    said |= {f"budget: {what}": f"{amount:,.10g}" for what, amount in sweep.budget.items()}
    said |= {"method": f"{sweep.method}, {sweep.n_trials} trials", "seeds": ", ".join(map(str, sweep.seeds))}
    return said | {"metric": f"{sweep.direction} {sweep.metric}"} | _pruning(sweep.pruning)


def _options(each: SearchDimension) -> str:
    if isinstance(each, Choices):
        return ", ".join(each.options)
    assert isinstance(each, NumericRange)
    how = " on a logarithmic scale" if each.log else f" in steps of {each.step:g}" if each.step else ""
    return f"{format_setting(each.low)} to {format_setting(each.high)}{how}"


def _pruning(given: Mapping[str, object] | None) -> dict[str, str]:
    return {} if not given else {"pruning": ", ".join(f"{name} {text(each)}" for name, each in given.items())}


def _importance(study: Study) -> dict[str, float]:
    """By fANOVA (Hutter et al. 2014), where more than one thing varied and there are trials to tell it from."""
    done = [trial for trial in study.trials() if trial.state == TrialState.COMPLETE]
    if len(study.sweep.vary) < 2 or len(done) < FEWEST or len({trial.value for trial in done}) < 2:
        return {}
    return dict(optuna.importance.get_param_importances(study.optuna, evaluator=FanovaImportanceEvaluator(seed=0)))
