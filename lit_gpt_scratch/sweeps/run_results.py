"""What became of a run, as plain data: read from its folder, kept in the study, shown in the report."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

HPARAMS: Final = ".hparams"
"""Suffix of event files that hold no curve."""
LONGEST: Final = 200
"""Points of a curve that are kept."""


class CurvePoint(NamedTuple):
    """A metric at one moment of a run."""

    step: int
    """Optimizer steps done."""
    seconds: float
    """Since the training began, without the time between two sessions."""
    value: float


@dataclass(frozen=True)
class RunResult:
    """One run of ``fit``.

    Args:
        seed: Its seed.
        state: ``finished``, ``pruned`` or ``failed``.
        reason: Why it did not finish.
        metrics: The numbers of ``summary.json``; of a run that did not finish, the last ones known.
        curve: The sweep's metric at each validation.
        folder: Where it lies.
        diagnoses: What its doctor said.
        session: Versions, hardware and code of its last session.
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
        """Of training, if the run says how many tokens it saw."""
        tokens, step = (self.metrics.get(name) for name in ("tokens", "step"))
        return tokens / step if tokens and step else None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "RunResult":
        """From JSON."""
        return cls(**{**plain, "curve": [CurvePoint(*each) for each in plain["curve"]]})


def read_run_result(folder: Path, seed: int, metric: str, state: str = "finished", reason: str = "") -> RunResult:
    """A run from its folder."""
    metrics = {}
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        metrics = {name: float(v) for name, v in summary.items() if isinstance(v, int | float)}
        if metric in summary and summary[metric] is None:
            state, reason = "failed", f"{metric} is not finite at the end"
    points = list(curve(folder, metric))
    if not metrics and points:
        metrics = {metric: points[-1].value, "step": points[-1].step}
    every = math.ceil(len(points) / LONGEST)
    return RunResult(
        seed=seed,
        state=state,
        reason=reason,
        metrics=metrics,
        curve=points[:: -every or 1][::-1],  # the last one stays
        folder=str(folder),
        diagnoses=_diagnoses(folder),
        session=_last_session(folder),
    )


def curve(folder: Path, metric: str) -> Iterator[CurvePoint]:
    """The metric over a run, from its events; a session of a resumed run takes the place of what it did again."""
    points: dict[int, CurvePoint] = {}
    for path in sorted(folder.glob("*tfevents*")):
        if path.name.endswith(HPARAMS):
            continue
        events = EventAccumulator(str(path), size_guidance={SCALARS: 0}).Reload()
        began = events.FirstEventTimestamp() if events.Tags()["scalars"] else 0.0
        found = events.Scalars(metric) if metric in events.Tags()["scalars"] else []
        if not found:
            continue
        points = {step: point for step, point in points.items() if step < found[0].step + 1}
        before = max((point.seconds for point in points.values()), default=0.0)
        for event in found:  # Lightning numbers a validation by the step that was just done, from 0
            if math.isfinite(event.value):
                points[event.step + 1] = CurvePoint(event.step + 1, before + event.wall_time - began, event.value)
    yield from points.values()


def logged(folder: Path) -> list[str]:
    """Names of the numbers that a run leaves."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return [name for name, value in summary.items() if value is None or isinstance(value, int | float)]


def latest_run_folder(experiment: Path) -> Path | None:
    """The newest run folder of an experiment."""
    found = [path for path in experiment.glob("version_*") if path.name.removeprefix("version_").isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix("version_")), default=None)


def _diagnoses(folder: Path) -> list[dict[str, str]]:
    try:
        said = json.loads((folder / "doctor.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [{part: each[part] for part in ("symptom", "cause", "flag")} for each in said]


def _last_session(folder: Path) -> dict[str, Any]:
    try:
        session = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["sessions"][-1]
    except (OSError, ValueError, LookupError):
        return {}
    return {part: session[part] for part in ("versions", "hardware", "code") if part in session}
