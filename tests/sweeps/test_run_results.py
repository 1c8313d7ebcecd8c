"""Reading results from run folders, and TensorBoard's HParams tab."""

import json
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tensorboard.summary.writer.event_file_writer import EventFileWriter

pytest.importorskip("optuna")

from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.sweeps.run_results import (
    CurvePoint,
    RunResult,
    latest_run_folder,
    logged_metrics,
    read_curve,
    read_run_result,
    write_hparams,
)
from tests.mutations import DEPTH, mutate_bytes, mutate_json, nested_json

METRIC = "val/bits_per_byte"


def write_events(folder: Path, points: dict[int, float], start: float, name: str = "") -> None:
    """Write the event file of a session that logs one point per second."""
    writer = EventFileWriter(str(folder), filename_suffix=name)
    writer.add_event(Event(wall_time=start, step=0, summary=Summary()))
    for nth, (step, value) in enumerate(points.items(), 1):
        scalar = Summary(value=[Summary.Value(tag=METRIC, simple_value=value)])
        writer.add_event(Event(wall_time=start + nth, step=step, summary=scalar))
    writer.close()


def test_curve_joins_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)  # names and start times of event files
    write_events(tmp_path, {9: 4.0, 19: 3.0, 29: 2.5}, 1000.0)
    monkeypatch.setattr(time, "time", lambda: 5000.0)
    write_events(tmp_path, {29: 2.0, 39: 1.0}, 5000.0)  # killed after a checkpoint at step 25, resumed later
    assert list(read_curve(tmp_path, METRIC)) == [
        CurvePoint(10, 1.0, 4.0), CurvePoint(20, 2.0, 3.0), CurvePoint(30, 3.0, 2.0), CurvePoint(40, 4.0, 1.0),
    ]  # fmt: skip
    assert list(read_curve(tmp_path, "val/other")) == []


def test_diverged_run_is_failed(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(f'{{"{METRIC}": null, "step": 3}}')
    run = read_run_result(tmp_path, 1, METRIC)
    assert (run.state, run.reason) == ("failed", f"{METRIC} is not finite at the end of the run")
    assert RunResult.from_dict(run.to_dict()) == run


def make_run_folder(folder: Path) -> dict[str, Any]:
    """Write the JSON files of a run; returns their contents by name."""
    contents: dict[str, Any] = {
        "summary.json": {METRIC: 1.5, "step": 3, "baselines": {"xz": 2.0}, "seconds": 4.0},
        "doctor.json": [{"symptom": "s: 1", "cause": "c", "flag": "f", "step": 7}],
        "provenance.json": {
            "sessions": [{"code": {"commit": None}, "versions": {"torch": "2"}, "hardware": {"threads": 1}}]
        },
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return contents


def try_to_read(folder: Path) -> None:
    """Read a damaged run, and use its result as a report does; anything but a ValueError fails."""
    with suppress(ValueError):
        run = read_run_result(folder, 0, METRIC)
        assert RunResult.from_dict(json.loads(json.dumps(run.to_dict()))) == run
        assert all(isinstance(value, float) for value in run.metrics.values())
        assert all("{symptom} {cause} {flag}".format(**each).partition(":") for each in run.diagnoses)
        assert all(str(value) for facts in run.session.values() for value in facts.values())
        logged_metrics(folder)
    RunFolder(folder).read_sessions()


@pytest.mark.parametrize("name", ["summary.json", "doctor.json", "provenance.json"])
def test_damaged_files_of_a_run(tmp_path: Path, name: str) -> None:
    content = make_run_folder(tmp_path)[name]
    for text in (nested_json(), '{"sessions":' * DEPTH, "null", "[]", "{}", "3", '"x"', "", "\0", "[null]"):
        (tmp_path / name).write_text(text)
        try_to_read(tmp_path)
    for seed in range(50):
        rng = random.Random(seed)
        damaged = json.dumps(mutate_json(content, rng)).encode()
        (tmp_path / name).write_bytes(damaged if seed % 4 else mutate_bytes(damaged, rng))
        try_to_read(tmp_path)


def test_whole_run_is_read(tmp_path: Path) -> None:
    make_run_folder(tmp_path)
    run = read_run_result(tmp_path, 0, METRIC)
    assert run.metrics == {METRIC: 1.5, "step": 3.0, "seconds": 4.0}
    assert run.diagnoses == [{"symptom": "s: 1", "cause": "c", "flag": "f"}]
    assert run.session["versions"] == {"torch": "2"}


def test_diagnoses_are_read(tmp_path: Path) -> None:
    diagnosis = {"symptom": "spike: 3 deviations", "cause": "a batch", "flag": "--guard act"}
    (tmp_path / "doctor.json").write_text(json.dumps([diagnosis | {"step": 7}]))
    run = read_run_result(tmp_path, 1, METRIC)
    assert run.diagnoses == [diagnosis]
    assert RunResult.from_dict(run.to_dict()) == run
    assert (
        RunResult.from_dict({name: value for name, value in run.to_dict().items() if name != "diagnoses"}).diagnoses
        == []
    )


def test_latest_run_folder(tmp_path: Path) -> None:
    for name in ("version_2", "version_10", "version_x"):
        (tmp_path / name).mkdir()
    assert latest_run_folder(tmp_path) == tmp_path / "version_10"
    assert latest_run_folder(tmp_path / "none") is None


def test_hparams_tab_shows_every_trial(tmp_path: Path) -> None:
    """Query as the tab's server does: settings of each group, and the last value of each metric."""
    values = {("1e-3", 1): 1.5, ("1e-3", 2): 1.7, ("rotary", 1): 1.2}
    for (setting, seed), value in values.items():
        folder = tmp_path / f"{setting}_{seed}" / "version_0"
        folder.mkdir(parents=True)
        write_events(folder, {9: 3.0, 19: value}, time.time())
        run = RunResult(seed, "finished" if value < 1.6 else "pruned", folder=str(folder))
        for _ in range(2):  # the second call finds the file
            write_hparams(run, {"what": setting, "lr": 0.5}, f"trial {setting}")
        assert len(list(folder.iterdir())) == 2
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path))
    context = backend_context.Context(TBContext(logdir=str(tmp_path), data_provider=provider))
    request = RequestContext()
    experiment = context.experiment_from_metadata(request, "", False, context.hparams_metadata(request, ""), [])
    assert {info.name for info in experiment.hparam_infos} == {"what", "lr"}
    query = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=10,
        aggregation_type=api_pb2.AGGREGATION_AVG,
        allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE],
        col_params=[api_pb2.ColParams(metric=api_pb2.MetricName(tag=METRIC))],
    )
    answer = list_session_groups.Handler(request, context, "", query).run()
    groups = {group.name: group for group in answer.session_groups}
    assert groups.keys() == {"trial 1e-3", "trial rotary"}
    assert groups["trial 1e-3"].hparams["what"].number_value == 1e-3
    assert groups["trial 1e-3"].hparams["lr"].number_value == 0.5
    assert groups["trial rotary"].hparams["what"].string_value == "rotary"
    means = {name: [m.value for m in group.metric_values if m.name.tag == METRIC] for name, group in groups.items()}
    assert means == {"trial 1e-3": [pytest.approx(1.6)], "trial rotary": [pytest.approx(1.2)]}
    statuses = sorted(session.status for group in groups.values() for session in group.sessions)
    assert statuses == [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE]
