"""The cost of callbacks and the time to a loss, in runs whose callbacks take known times and read known values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_gpt_scratch.acceptance import fit_probes
from lit_gpt_scratch.acceptance.fit_probes import PROBE_FILE, TRACE_FILE, CallbackCost, TimeToLoss
from lit_gpt_scratch.acceptance.fit_rows import describe_synchronizations
from lit_gpt_scratch.acceptance.profiler_trace import count_by_step, read_trace
from lit_gpt_scratch.callbacks.throughput import DataLoaderTimer
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.tasks import LanguageModel

Build = Callable[..., Any]
now = [0.0]


class Costly(L.Callback):
    """Takes a second per step, on a simulated clock, and reads two values."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step - 1)
        now[0] += 1
        torch.ones(2).tolist()
        torch.ones(()).item()
        torch.ones(()).item()


def test_cost_of_callbacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trainer: Build, task: Build, packed_text: Build
) -> None:
    """Five seconds per step with the costly callback, four without; both are in the report, and none of the warm-up."""
    monkeypatch.setattr(fit_probes.time, "perf_counter", lambda: now[0])
    probe, costly = CallbackCost(warmup=2, profiled=4, blocks=4, block_steps=3), Costly()
    probe.folder = RunFolder(tmp_path)
    model: LanguageModel = task()
    step = model.training_step

    def training_step(*given: Any) -> Any:
        now[0] += 4
        return step(*given)

    monkeypatch.setattr(model, "training_step", training_step)
    run = trainer(callbacks=[probe, costly], max_steps=probe.steps, log_every_n_steps=2, limit_val_batches=0)
    run.profiler = DataLoaderTimer(run.profiler)  # as the callback that measures the throughput does
    profile = run.profiler.profile
    run.fit(model, packed_text())
    assert run.profiler.profile == profile
    assert run.global_step == 2 + 2 * 4 + 4 * 3 + 1
    blocks = [*range(10, 10 + 3), *range(10 + 9, 23)]  # with, without, without, with
    assert costly.steps == [*range(6), *blocks]
    found = json.loads((tmp_path / PROBE_FILE).read_text(encoding="utf-8"))
    assert found == {"seconds_per_step": {"with": 5.0, "without": 4.0}, "log_every_n_steps": 2, "first_step_without": 6}
    assert run.callbacks == [probe, costly]
    values: dict[str, Any] = {}
    for each in describe_synchronizations(tmp_path / TRACE_FILE, 2, 6):
        values |= each
    assert values["cudaStreamSynchronize per ordinary step"] == 0
    assert values["item() per ordinary step"] >= 2
    assert values["item() per ordinary step"] == int(values["item() per ordinary step"])
    assert values["item() of callbacks per ordinary step"] == 2
    assert "[Callback]Costly.on_train_batch_end: aten::item 2" in values["item() per ordinary step from"]


def test_profiler_marks_each_step(tmp_path: Path, trainer: Build, task: Build, packed_text: Build) -> None:
    probe = CallbackCost(warmup=1, profiled=3, blocks=2, block_steps=1)
    probe.folder = RunFolder(tmp_path)
    trainer(callbacks=[probe], max_steps=probe.steps, limit_val_batches=0).fit(task(), packed_text())
    assert sorted(count_by_step(read_trace(tmp_path / TRACE_FILE))) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("target", "reached"), [(100.0, True), (0.1, False)])
def test_time_to_loss(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trainer: Build, task: Build, packed_text: Build,
    target: float, reached: bool,
) -> None:  # fmt: skip
    """Training steps take a second, validations a hundred, which do not count."""
    monkeypatch.setattr(fit_probes.time, "perf_counter", lambda: now[0])
    model: LanguageModel = task()
    for name, seconds in (("training_step", 1), ("validation_step", 100)):
        step = getattr(model, name)

        def slow(*given: Any, step: Any = step, seconds: int = seconds) -> Any:
            now[0] += seconds
            return step(*given)

        monkeypatch.setattr(model, name, slow)
    probe = TimeToLoss(target)
    probe.folder = RunFolder(tmp_path)
    run = trainer(callbacks=[probe], max_steps=6, val_check_interval=2, check_val_every_n_epoch=None)
    run.fit(model, packed_text())
    found = json.loads((tmp_path / PROBE_FILE).read_text(encoding="utf-8"))
    assert found["reached"] == reached
    assert found["first_step_seconds"] == 1
    assert [point["step"] for point in found["points"]] == ([2] if reached else [2, 4, 6])
    assert [point["seconds"] for point in found["points"]] == ([2] if reached else [2, 4, 6])
    assert all(1 < point["loss"] < 10 for point in found["points"])
