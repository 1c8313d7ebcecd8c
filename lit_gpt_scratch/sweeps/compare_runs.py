"""The report of runs that were made one by one: what varied is read from their configs."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_gpt_scratch.checkpoint.config_diff import flatten
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.build_command import short, text
from lit_gpt_scratch.sweeps.report import SweepReport
from lit_gpt_scratch.sweeps.run_results import RunResult, logged, read_run_result
from lit_gpt_scratch.sweeps.search_space import format_label
from lit_gpt_scratch.sweeps.sweep_config import nearest
from lit_gpt_scratch.sweeps.trial import TrialResult

NO_CHOICE = ("runs", "experiment", "ckpt_path", "force", "plan", "seed_everything", "config", "preset")
"""Flags that are no part of what was tried."""


def compare(paths: Sequence[Path], metric: str, direction: str) -> SweepReport:
    """A report of runs; those with equal flags but for the seed are one arm, and the first run's is the baseline.

    Args:
        paths: Run folders, or folders with run folders in them.
        metric: Of ``summary.json``.
        direction: ``minimize`` or ``maximize``.

    Raises:
        UserError: A path has no run that came to its end, two runs are alike, or one does not have the metric.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in _runs_in(path)))
    configs = [_config(folder) for folder in folders]
    differ = [
        name
        for name in dict.fromkeys(name for config in configs for name in config)
        if name not in NO_CHOICE and len({text(config.get(name)) for config in configs}) > 1
    ]
    arms: dict[tuple[str, ...], TrialResult] = {}
    for folder, config in zip(folders, configs, strict=True):
        key = tuple(format_label(config.get(name)) for name in differ)
        flags = [f"--config={folder / 'config.yaml'}"]
        arm = arms.setdefault(key, TrialResult(len(arms), dict(zip(map(short, differ), key, strict=True)), flags=flags))
        run = _run(folder, int(config["seed_everything"]), metric)
        same = next((other for other in arm.runs if other.seed == run.seed), None)
        if same is not None:
            raise UserError(f"{same.folder} and {folder} have the same flags and the same seed; name one of them")
        arm.runs.append(run)
    found = list(arms.values())
    return SweepReport(
        title="A comparison of runs",
        question="",
        metric=metric,
        direction=direction,
        arms=found,
        baseline=found[0],
        setting={short(name): ", ".join(dict.fromkeys(format_label(c.get(name)) for c in configs)) for name in differ},
        command=shlex.join(
            ["python", "-m", "lit_gpt_scratch.sweep", "--compare", *map(str, paths), f"--metric={metric}"]
            + ([] if direction == "minimize" else [f"--direction={direction}"])
        ),
    )


def _runs_in(path: Path) -> list[Path]:
    found = sorted(file.parent for file in path.rglob("summary.json") if (file.parent / "config.yaml").is_file())
    if not found:
        raise UserError(f"--compare: no run that came to its end is in {path}")
    return found


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        return flatten(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"--compare: cannot read {folder / 'config.yaml'}") from error


def _run(folder: Path, seed: int, metric: str) -> RunResult:
    try:
        run = read_run_result(folder, seed, metric)
        names = logged(folder)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"--compare: cannot read {folder / 'summary.json'}") from error
    if metric not in names:
        raise UserError(f"--metric: {folder} has no {metric}{nearest(metric, names)}; there are {', '.join(names)}")
    return run
