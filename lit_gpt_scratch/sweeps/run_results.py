"""Read the results of runs and trials from run folders, serialize them for the study, and show them in TensorBoard."""

import io
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
from tensorboard.summary.writer.record_writer import RecordWriter
from typing_extensions import TypedDict

from lit_gpt_scratch.diagnostics.tensorboard_reader import HPARAMS_SUFFIX, event_files, read_events, scalar_value
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.sweeps.statistics import Estimate, estimate_mean
from lit_gpt_scratch.sweeps.sweep_config import Assignment
from lit_gpt_scratch.text.atomic_files import write_atomically

log = logging.getLogger(__name__)

SUMMARY_FILE: Final = "summary.json"
ENVIRONMENT_PARTS: Final = ("code", "versions", "hardware")
"""Parts of a ``provenance.json`` entry that describe the environment of a session."""
MAX_METRIC: Final = 1e38
"""Maximum absolute value of a metric, close to the maximum of float32; larger values are treated as non-finite."""
MAX_CURVE_POINTS: Final = 200
"""Maximum number of points per stored curve; longer curves are subsampled."""


T = TypeVar("T")


class CurvePoint(NamedTuple):
    """Metric value from one validation pass."""

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
        reason: Reason why the run did not finish, or an empty string if it finished.
        metrics: Numeric values in ``summary.json``, keyed by name. If the run did not finish, this dict contains only
            the last logged value of the sweep's metric, and ``step``, the step at which the value was logged.
        curve: Values of the sweep's metric during training, at most ``MAX_CURVE_POINTS``.
        folder: Path to the run folder.
        diagnoses: Entries of ``doctor.json``, each with a symptom, its likely cause, and a flag to try.
        session: Package versions, hardware and code version of the run's last session, from ``provenance.json``.
        retryable: Whether the run failed because of its environment, not its settings, so that repeating the sweep
            executes it again.
        attempts: Number of times that the run failed because of its environment, even after retries.
        started: Time in ISO 8601 at which the first session of the run started, from ``provenance.json``.
    """

    seed: int
    state: str = "finished"
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[CurvePoint] = field(default_factory=list)
    folder: str = ""
    diagnoses: list[dict[str, str]] = field(default_factory=list)
    session: dict[str, Any] = field(default_factory=dict)
    retryable: bool = False
    attempts: int = 0
    started: str = ""

    @property
    def tokens_per_step(self) -> float | None:
        """Training tokens per optimizer step, or None if the run does not log how many tokens it has read."""
        tokens, step = (self.metrics.get(name) for name in ("tokens", "step"))
        return tokens / step if tokens and step else None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a dictionary of JSON-serializable values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "RunResult":
        """Build a result from the output of ``to_dict``; fields that a newer version added are ignored."""
        known = {each.name for each in fields(cls)}
        curve = [CurvePoint(*point) for point in plain["curve"]]
        return cls(**{**{name: value for name, value in plain.items() if name in known}, "curve": curve})


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
        runs have finished, and otherwise ``unfinished``. Runs that will be executed again are ignored.
        """
        states = [run.state for run in self.runs if not run.retryable]
        for state in ("failed", "pruned"):
            if state in states:
                return state
        return "finished" if len(states) >= self.expected_runs else "unfinished"

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
    """Return the finished trials that have the metric, sorted by mean, best first."""
    sign = 1 if direction == "minimize" else -1
    finished = [trial for trial in trials if trial.state == "finished" and trial.values(metric)]
    return sorted(finished, key=lambda trial: sign * trial.mean(metric).mean)


def read_run_result(
    folder: Path, seed: int, metric: str, state: str = "finished", reason: str = "", retryable: bool = False
) -> RunResult:
    """Read the result of a run from its folder.

    The state is ``failed`` if the metric is not finite at the end of the run, or if the spike guard stopped the run.

    Raises:
        UserError: ``summary.json`` exists, but cannot be read.
    """
    metrics: dict[str, float] = {}
    if (folder / SUMMARY_FILE).is_file():
        summary = read_summary(folder)
        metrics = {name: float(value) for name, value in summary.items() if is_finite_number(value)}
        if summary.get("stopped") == "guard":
            state, reason, retryable = "failed", "--guard act stopped the run after too many skipped steps", False
        elif metric in _names_of_metrics(summary) and metric not in metrics:
            state, reason, retryable = "failed", f"{metric} is not finite at the end of the run", False
    points = list(read_curve(folder, metric))
    if not metrics and points:
        metrics = {metric: points[-1].value, "step": points[-1].step}
    every = math.ceil(len(points) / MAX_CURVE_POINTS)
    sessions = _read_sessions(folder)
    return RunResult(
        seed=seed,
        state=state,
        reason=reason,
        metrics=metrics,
        curve=points[:: -every or 1][::-1],  # subsampled from the end, to keep the last point
        folder=str(folder),
        diagnoses=_read_diagnoses(folder),
        session={key: value for key, value in sessions[-1].items() if key in ENVIRONMENT_PARTS} if sessions else {},
        retryable=retryable,
        started=sessions[0].get("started", "") if sessions else "",
    )


def read_curve(folder: Path, metric: str, growing: bool = False) -> Iterator[CurvePoint]:
    """Yield the metric value of each validation pass from a run's event files.

    If steps were repeated after the run was resumed, the later values replace the earlier values.

    Args:
        folder: Run folder.
        metric: Name of the metric.
        growing: Whether the run is still writing its event files.
    """
    points: dict[int, CurvePoint] = {}
    for path in event_files(folder):
        start: float | None = None
        offset: float | None = None
        for event in read_events(path, growing):
            start = event.wall_time if start is None else start
            for value in event.summary.value:
                number = scalar_value(value) if value.tag == metric else None
                if number is None or not is_finite_number(number) or not math.isfinite(event.wall_time - start):
                    continue
                step = event.step + 1  # Lightning logs validation metrics at the 0-based index of the last step
                if offset is None:  # the first value of the session
                    points = {at: point for at, point in points.items() if at < step}
                    offset = max((point.seconds for point in points.values()), default=0.0)
                points[step] = CurvePoint(step, offset + event.wall_time - start, number)
    yield from points.values()


def read_summary(folder: Path) -> dict[str, Any]:
    """Read a run's ``summary.json``.

    Raises:
        UserError: The file is missing, or is not a JSON object.
    """
    return _read_json(folder / SUMMARY_FILE, dict[str, Any])


def is_finished(folder: Path) -> bool:
    """Return whether a run has written a valid summary; log a warning if the summary is corrupted."""
    if not (folder / SUMMARY_FILE).is_file():
        return False
    try:
        read_summary(folder)
    except UserError as error:
        log.warning("%s", error)
        return False
    return True


def logged_metrics(folder: Path) -> list[str]:
    """Return the names of the metrics in a run's ``summary.json``.

    Raises:
        UserError: The file is missing, or is not a JSON object.
    """
    return _names_of_metrics(read_summary(folder))


def is_finite_number(value: Any) -> bool:
    """Return whether a value from a file is a finite number whose absolute value is at most ``MAX_METRIC``."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_METRIC


def _names_of_metrics(summary: Mapping[str, Any]) -> list[str]:
    """Return the names of all values that are numbers or null; ``fit`` writes null for a non-finite metric."""
    return [name for name, value in summary.items() if value is None or isinstance(value, int | float)]


def _read_json(path: Path, hint: type[T]) -> T:
    try:
        value = read_json(path, hint)
        json.dumps(value, ensure_ascii=False).encode()  # lone surrogates cannot be written to a report
        return value
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
        raise UserError(f"cannot read {path}: {reason}; run fit again") from error


def latest_run_folder(experiment: Path) -> Path | None:
    """Return the experiment's ``version_N`` folder with the highest N, or None if there is none."""
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
    now, content = time.time(), io.BytesIO()
    # Not EventFileWriter, whose thread prints a traceback if the disk is full.
    records = RecordWriter(content)
    records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for summary in (start, end_summary):
        records.write(Event(wall_time=now, summary=summary).SerializeToString())
    name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}{HPARAMS_SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, content.getvalue())
    except OSError as error:  # the results do not depend on this file
        log.warning("cannot write the settings of %s for TensorBoard: %s", folder, error.strerror or error)


def _as_number(setting: str | float) -> str | float:
    """Convert a setting to a number if possible, so that TensorBoard sorts by value."""
    try:
        return float(setting)
    except ValueError:
        return setting


class RecordedDiagnosis(TypedDict):
    """Schema of a ``doctor.json`` entry."""

    symptom: str
    cause: str
    flag: str


class RecordedSession(TypedDict, total=False):
    """Fields of a ``provenance.json`` entry that are used in the report."""

    started: str
    versions: dict[str, str | int | float | bool | None]
    hardware: dict[str, str | int | float | bool | None]
    code: dict[str, str | int | float | bool | None]


class RecordedSessions(TypedDict):
    """Schema of ``provenance.json``."""

    sessions: list[RecordedSession]


def _read_diagnoses(folder: Path) -> list[dict[str, str]]:
    diagnoses = _read_optional_json(folder / "doctor.json", list[RecordedDiagnosis]) or []
    return [{"symptom": each["symptom"], "cause": each["cause"], "flag": each["flag"]} for each in diagnoses]


def _read_sessions(folder: Path) -> list[RecordedSession]:
    provenance = _read_optional_json(folder / "provenance.json", RecordedSessions)
    return provenance["sessions"] if provenance else []


def _read_optional_json(path: Path, hint: type[T]) -> T | None:
    """Parse a JSON file, or return None if it is missing or corrupted; log a warning if it is corrupted."""
    if not path.is_file():
        return None
    try:
        return _read_json(path, hint)
    except UserError as error:
        log.warning("%s", error)
        return None
