"""Build sweep reports from a study or from the folders of manually started runs."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import TrialState

from lit_gpt_scratch.bounded_yaml import load_yaml
from lit_gpt_scratch.checkpoint.config_diff import flatten
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.fit_command import ResolvedBaseline, format_flag_value, short_flag
from lit_gpt_scratch.sweeps.report import SweepReport
from lit_gpt_scratch.sweeps.run_results import RunResult, TrialResult, format_setting, logged_metrics, read_run_result
from lit_gpt_scratch.sweeps.scaling_report import analyze_ladder
from lit_gpt_scratch.sweeps.search_space import Choices, NumericRange, SearchDimension, format_label
from lit_gpt_scratch.sweeps.study import Study, study_trials
from lit_gpt_scratch.sweeps.sweep_config import Assignment, SweepConfig, suggest_closest

MIN_TRIALS: Final = 4
"""Minimum number of complete trials required to estimate the importance of search dimensions."""
NOT_VARIED: Final = (
    "runs", "experiment", "ckpt_path", "force", "plan", "devices_like", "seed_everything", "config", "preset",
)  # fmt: skip
"""Flags that are ignored when comparing the configs of runs."""


def build_study_report(study: Study, path: Path) -> SweepReport:
    """Build a report on the current state of a study.

    Only the study is read, not the run folders, which may be on other machines.

    Args:
        study: A study that already exists in its storage.
        path: Path to the sweep file.
    """
    sweep, baseline = study.sweep, study.baseline or ResolvedBaseline()
    trials = study_trials(study, baseline)
    return SweepReport(
        title=sweep.name.replace("_", " ").capitalize(),
        question=sweep.question,
        metric=sweep.metric,
        direction=sweep.direction,
        trials=trials,
        baseline=next((trial for trial in trials if trial.assignment == sweep.baseline_assignment), None),
        setup=describe_setup(sweep),
        command=shlex.join(["python", "-m", "lit_gpt_scratch.sweep", str(path)]),
        importance={} if sweep.scaling is not None else _importance(study),
        scaling=analyze_ladder(sweep, trials, study.prediction) if sweep.scaling is not None else None,
    )


def build_comparison_report(paths: Sequence[Path], metric: str, direction: str) -> SweepReport:
    """Build a report that compares finished runs.

    Runs whose flags differ only in the seed form a trial; the first trial is the baseline.

    Args:
        paths: Run folders, or folders that contain run folders.
        metric: Metric to compare, a key in ``summary.json``.
        direction: Whether to ``minimize`` or ``maximize`` the metric.

    Raises:
        UserError: A path contains no finished run, a run folder is corrupted, two runs have the same flags and seed, or
            a run lacks the metric.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _finished_runs(path)))
    configs = [_read_config(folder) for folder in folders]
    varied = [
        name
        for name in dict.fromkeys(name for config in configs for name in config)
        if name not in NOT_VARIED and len({format_flag_value(config.get(name)) for config in configs}) > 1
    ]
    trials: dict[tuple[str, ...], TrialResult] = {}
    for folder, config in zip(folders, configs, strict=True):
        key = tuple(format_label(config.get(name)) for name in varied)
        assignment: Assignment = dict(zip(map(short_flag, varied), key, strict=True))
        flags = [f"--config={folder / 'config.yaml'}"]
        trial = trials.setdefault(key, TrialResult(len(trials), assignment, flags=flags))
        run = _read_finished_run(folder, config["seed_everything"], metric)
        same = next((other for other in trial.runs if other.seed == run.seed), None)
        if same is not None:
            raise UserError(f"{same.folder} and {folder} have the same flags and seed; pass only one of them")
        trial.runs.append(run)
    compared = list(trials.values())
    return SweepReport(
        title="Comparison of runs",
        question="",
        metric=metric,
        direction=direction,
        trials=compared,
        baseline=compared[0],
        setup={short_flag(n): ", ".join(dict.fromkeys(format_label(c.get(n)) for c in configs)) for n in varied},
        command=shlex.join(
            ["python", "-m", "lit_gpt_scratch.sweep", "--compare", *map(str, paths), f"--metric={metric}"]
            + ([] if direction == "minimize" else [f"--direction={direction}"])
        ),
    )


def describe_setup(sweep: SweepConfig) -> dict[str, str]:
    """Return descriptions of the flags, budget, search method, seeds, metric and pruning of a sweep, keyed by name."""
    setup = {name: _describe_dimension(dimension) for name, dimension in sweep.vary.items()}
    setup |= {"base": ", ".join(map(str, sweep.base)) or "the defaults of fit"}
    setup |= {f"fixed: {name}": format_flag_value(value) for name, value in sweep.fixed.items()}
    setup |= {f"budget: {unit}": f"{amount:,.10g}" for unit, amount in sweep.budget.items()}
    setup |= {"method": f"{sweep.method}, {sweep.n_trials} trials", "seeds": ", ".join(map(str, sweep.seeds))}
    setup |= {"metric": f"{sweep.direction} {sweep.metric}"}
    if sweep.pruning:
        setup["pruning"] = ", ".join(f"{name} {format_flag_value(each)}" for name, each in sweep.pruning.items())
    if sweep.held_out is not None:
        setup["held out"] = ", ".join(f"{name} {format_setting(each)}" for name, each in sweep.held_out.items())
    return setup


def _describe_dimension(dimension: SearchDimension) -> str:
    if isinstance(dimension, Choices):
        return ", ".join(dimension.options)
    assert isinstance(dimension, NumericRange)
    scale = ""
    if dimension.log:
        scale = ", logarithmic"
    elif dimension.step:
        scale = f" in steps of {dimension.step:g}"
    return f"{format_setting(dimension.low)} to {format_setting(dimension.high)}{scale}"


def _importance(study: Study) -> dict[str, float]:
    """Return the fANOVA importance (Hutter et al. 2014) of each search dimension, keyed by name.

    Return an empty dict if there are too few dimensions, trials or distinct metric values.
    """
    complete = [trial for trial in study.trials() if trial.state == TrialState.COMPLETE]
    if len(study.sweep.vary) < 2 or len(complete) < MIN_TRIALS or len({trial.value for trial in complete}) < 2:
        return {}
    evaluator = FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study.optuna_study, evaluator=evaluator))


def _finished_runs(path: Path) -> list[Path]:
    folders = sorted(file.parent for file in path.rglob("summary.json") if (file.parent / "config.yaml").is_file())
    if not folders:
        raise UserError(f"--compare: {path} contains no finished run; pass a folder with a finished run of fit")
    return folders


def _read_config(folder: Path) -> Mapping[str, Any]:
    """Read a run's flags, keyed by dotted name, and reject them if ``seed_everything`` is not an integer."""
    path = folder / "config.yaml"
    try:
        config, _ = load_yaml(path)
    except UserError as error:
        raise UserError(f"--compare: {error}") from error
    flat = flatten(config) if isinstance(config, dict) else {}
    seed = flat.get("seed_everything")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UserError(f"--compare: {path} has no integer seed_everything; pass a run folder written by fit")
    return flat


def _read_finished_run(folder: Path, seed: int, metric: str) -> RunResult:
    try:
        run = read_run_result(folder, seed, metric)
        names = logged_metrics(folder)
    except UserError as error:
        raise UserError(f"--compare: {error}") from error
    if metric not in names:
        raise UserError(
            f"--metric: {folder} does not log {metric}{suggest_closest(metric, names)}; logged metrics: "
            f"{', '.join(names)}"
        )
    return run
