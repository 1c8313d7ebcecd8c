"""Results of runs and trials, which are read from run folders, stored in the study and shown in TensorBoard."""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from typing_extensions import TypedDict

from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.sweeps.statistics import Estimate, estimate_mean
from lit_gpt_scratch.sweeps.sweep_config import Assignment

HPARAMS_SUFFIX: Final = ".hparams"
"""Suffix of event files that contain hyperparameters instead of scalars."""
MAX_CURVE_POINTS: Final = 200
"""Maximum number of points per stored curve."""


class CurvePoint(NamedTuple):
    """Value of the metric in one validation run."""

    step: int
    """Number of completed optimizer steps."""
    seconds: float
    """Training time so far in seconds, excluding pauses between sessions."""
    value: float


@dataclass(frozen=True)
class RunResult:
    """Result of one run of ``fit``.

    Studies store results as JSON, so the field names are part of a file format.

    Args:
        seed: Seed of the run.
        state: ``finished``, ``pruned`` or ``failed``.
        reason: Reason why the run did not finish; empty if the run finished.
        metrics: Numeric values in ``summary.json``, keyed by name. If the run did not finish, the last logged value of
            the sweep's metric and the step at which it was logged.
        curve: Values of the sweep's metric during training, at most ``MAX_CURVE_POINTS``.
        folder: Path of the run folder.
        diagnoses: Entries of ``doctor.json``, each with a symptom, its likely cause, and a flag to try.
        session: Package versions, hardware and code version of the run's last session, from ``provenance.json``.
    """

    seed: int
    state: str = "finished"
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[CurvePoint] = field(default_factory=list)
    folder: str = ""
    diagnoses: list[dict[str, str]] = field(default_factory=list)
    session: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_step(self) -> float | None:
        """Number of training tokens per optimizer step; None if the run does not log its number of tokens."""
        tokens, step = (self.metrics.get(name) for name in ("tokens", "step"))
        return tokens / step if tokens and step else None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a dictionary of JSON-serializable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "RunResult":
        """Build a result from the output of ``to_dict``."""
        return cls(**{**plain, "curve": [CurvePoint(*point) for point in plain["curve"]]})


@dataclass(frozen=True)
class TrialResult:
    """Result of a trial: its settings and the results of its runs, one per seed.

    Args:
        number: Trial number.
        assignment: Settings of the trial, keyed by dimension name.
        runs: Results available so far, one per seed.
        flags: Command-line arguments of ``fit``, except for the seed and the run folder.
        expected_runs: Number of runs in the complete trial.
    """

    number: int
    assignment: Assignment
    runs: list[RunResult] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    expected_runs: int = 1

    @property
    def label(self) -> str:
        """Settings of the trial, separated by commas."""
        return ", ".join(format_setting(setting) for setting in self.assignment.values()) or "the runs"

    @property
    def state(self) -> str:
        """State of the trial.

        The state is ``failed`` if any run failed, ``pruned`` if any run was pruned and none failed, ``finished`` if all
        runs have finished, and otherwise ``unfinished``.
        """
        ended = [run.state for run in self.runs if run.state != "finished"]
        if ended:
            return "failed" if "failed" in ended else "pruned"
        return "finished" if len(self.runs) >= self.expected_runs else "unfinished"

    def values(self, metric: str) -> dict[int, float]:
        """Return the value of a metric for each finished run, keyed by seed."""
        return {run.seed: run.metrics[metric] for run in self.runs if run.state == "finished" and metric in run.metrics}

    def mean(self, metric: str) -> Estimate:
        """Return the mean and confidence interval of a metric over the seeds; at least one run must have finished."""
        return estimate_mean(list(self.values(metric).values()))


def format_setting(setting: str | float) -> str:
    """Format a setting for tables and plot legends."""
    return f"{setting:.4g}" if isinstance(setting, float) else str(setting)


def rank_finished(trials: Sequence[TrialResult], metric: str, direction: str) -> list[TrialResult]:
    """Return the finished trials that have the metric, in order of their means, best first."""
    sign = 1 if direction == "minimize" else -1
    finished = [trial for trial in trials if trial.state == "finished" and trial.values(metric)]
    return sorted(finished, key=lambda trial: sign * trial.mean(metric).mean)


def read_run_result(folder: Path, seed: int, metric: str, state: str = "finished", reason: str = "") -> RunResult:
    """Read the result of a run from its folder; the state is ``failed`` if the metric is not finite.

    Raises:
        OSError: A file cannot be read.
        ValueError: ``summary.json`` is damaged.
    """
    metrics = {}
    if (folder / "summary.json").is_file():
        summary = read_json(folder / "summary.json", dict[str, Any])
        metrics = {name: float(v) for name, v in summary.items() if _is_number(v)}
        if metric in summary and summary[metric] is None:
            state, reason = "failed", f"{metric} is not finite at the end of the run"
    points = list(read_curve(folder, metric))
    if not metrics and points:
        metrics = {metric: points[-1].value, "step": points[-1].step}
    every = math.ceil(len(points) / MAX_CURVE_POINTS)
    return RunResult(
        seed=seed,
        state=state,
        reason=reason,
        metrics=metrics,
        curve=points[:: -every or 1][::-1],  # subsampled from the end, to keep the last point
        folder=str(folder),
        diagnoses=_read_diagnoses(folder),
        session=_read_last_session(folder),
    )


def read_curve(folder: Path, metric: str) -> Iterator[CurvePoint]:
    """Yield the metric of each validation run from event files.

    If steps were repeated after the run was resumed, the later values replace the earlier ones.
    """
    points: dict[int, CurvePoint] = {}
    for path in sorted(folder.glob("*tfevents*")):
        if path.name.endswith(HPARAMS_SUFFIX):
            continue
        events = EventAccumulator(str(path), size_guidance={SCALARS: 0}).Reload()
        start = events.FirstEventTimestamp() if events.Tags()["scalars"] else 0.0
        scalars = events.Scalars(metric) if metric in events.Tags()["scalars"] else []
        if not scalars:
            continue
        points = {step: point for step, point in points.items() if step < scalars[0].step + 1}
        offset = max((point.seconds for point in points.values()), default=0.0)
        for event in scalars:  # Lightning logs validation metrics at the 0-based index of the last step
            if math.isfinite(event.value):
                points[event.step + 1] = CurvePoint(event.step + 1, offset + event.wall_time - start, event.value)
    yield from points.values()


def logged_metrics(folder: Path) -> list[str]:
    """Return the names of the metrics in a run's ``summary.json``."""
    summary = read_json(folder / "summary.json", dict[str, Any])
    return [name for name, value in summary.items() if value is None or _is_number(value)]


def latest_run_folder(experiment: Path) -> Path | None:
    """Return the experiment's ``version_N`` folder with the highest N; None if there is none."""
    versions = [path for path in experiment.glob("version_*") if path.name.removeprefix("version_").isdigit()]
    return max(versions, key=lambda path: int(path.name.removeprefix("version_")), default=None)


def write_hparams(run: RunResult, assignment: Assignment, group: str) -> None:
    """Write a run's settings to an event file for TensorBoard's HParams tab, unless one already exists.

    Args:
        run: Result of the run; the event file is written to its folder.
        assignment: Settings of the run, keyed by dimension name.
        group: Name shared by the runs of a trial, whose metrics TensorBoard averages.
    """
    folder = Path(run.folder)
    if any(folder.glob(f"*{HPARAMS_SUFFIX}")):
        return
    settings: dict[str, str | float] = {name: _as_number(setting) for name, setting in assignment.items()}
    start = summary_v2.hparams_pb(settings, trial_id=group)
    status = STATUS_SUCCESS if run.state == "finished" else STATUS_FAILURE
    end = plugin_data_pb2.HParamsPluginData(
        session_end_info=plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    )
    end_metadata = metadata.create_summary_metadata(end)
    end_summary = Summary(
        value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=end_metadata, tensor=metadata.NULL_TENSOR)]
    )
    writer = EventFileWriter(str(folder), filename_suffix=HPARAMS_SUFFIX)
    for summary in (start, end_summary):
        writer.add_event(Event(wall_time=time.time(), summary=summary))
    writer.close()


def _as_number(setting: str | float) -> str | float:
    """Convert a setting to a number if possible, so that TensorBoard sorts by value."""
    try:
        return float(setting)
    except ValueError:
        return setting


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


class RecordedDiagnosis(TypedDict):
    """Entry of ``doctor.json``."""

    symptom: str
    cause: str
    flag: str


class RecordedSession(TypedDict, total=False):
    """Parts of an entry of ``provenance.json`` that are shown in the report."""

    versions: dict[str, str | int | float | bool | None]
    hardware: dict[str, str | int | float | bool | None]
    code: dict[str, str | int | float | bool | None]


class RecordedSessions(TypedDict):
    """Content of ``provenance.json``."""

    sessions: list[RecordedSession]


def _read_diagnoses(folder: Path) -> list[dict[str, str]]:
    try:
        diagnoses = read_json(folder / "doctor.json", list[RecordedDiagnosis])
    except (OSError, ValueError):
        return []
    return [{"symptom": each["symptom"], "cause": each["cause"], "flag": each["flag"]} for each in diagnoses]


def _read_last_session(folder: Path) -> dict[str, Any]:
    try:
        sessions = read_json(folder / "provenance.json", RecordedSessions)["sessions"]
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in (sessions or [{}])[-1].items() if key in RecordedSession.__annotations__}
