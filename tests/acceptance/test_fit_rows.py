"""What rows conclude from runs of ``fit``, whose results are given."""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_gpt_scratch.acceptance import fit_rows
from lit_gpt_scratch.acceptance.fit_probes import PROBE_FILE, TRACE_FILE
from lit_gpt_scratch.acceptance.fit_rows import (
    measure_callback_cost,
    measure_fit,
    measure_resume,
    measure_time_to_loss,
)
from lit_gpt_scratch.acceptance.live_values import listening
from lit_gpt_scratch.acceptance.profiler_trace import STEP_MARK
from lit_gpt_scratch.acceptance.row import RowFailed, Values
from lit_gpt_scratch.checkpoint.resume_stress_test import StressTestReport
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from tests.acceptance.simulated_gpu import context_in

SUMMARY = {
    "step": 100, "seconds": 12.5, "tokens_per_second": 1e6, "train/loss": 3.5, "val/loss": 3.6,
    "throughput": {
        "data": 0.1, "generation": 0.0, "forward": 0.3, "backward": 0.5, "optimizer": 0.1, "rest": 0.0,
        "model_flops_utilisation": {"nominal": 0.4, "measured": 0.5}, "peak_memory_gigabytes": 20.0,
    },
}  # fmt: skip


def collect(rows: Iterator[Values]) -> tuple[Values, str]:
    values: Values = {}
    try:
        for found in rows:
            values |= found
    except RowFailed as failure:
        return values, str(failure)
    return values, ""


def test_values_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fit_rows, "run_fit", lambda context, *flags: (SUMMARY, 20.0))
    values, reason = collect(measure_fit(context_in(tmp_path), ("--x=1",)))
    assert not reason
    assert values == {
        "command s": 20.0, "steps": 100, "training s": 12.5, "tokens/s": 1e6, "train loss": 3.5, "val loss": 3.6,
        "peak memory GB": 20.0, "MFU of nominal peak": 0.4, "MFU of measured peak": 0.5, "data share": 0.1,
        "forward share": 0.3, "backward share": 0.5, "optimizer share": 0.1,
    }  # fmt: skip


def test_loss_that_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    diverged = {**SUMMARY, "train/loss": None, "throughput": None}
    monkeypatch.setattr(fit_rows, "run_fit", lambda context, *flags: (diverged, 20.0))
    values, reason = collect(measure_fit(context_in(tmp_path), ()))
    assert reason == "the training loss is not finite"
    assert values["tokens/s"] == 1e6


@pytest.mark.parametrize("differences", [{}, {"/state_dict/head": 3}])
def test_differing_bits_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, differences: dict[str, int]) -> None:
    class Resumed:
        def __init__(self, flags: list[str], folder: Path, seed: int) -> None:
            assert flags[0] == "--x=1"
            assert "--trainer.devices=1" in flags

        def run(self, kills: int, on_kill: Callable[[], object]) -> StressTestReport:
            self.report = StressTestReport(Counter({"while saving": 1}), 0, 0, Counter())
            on_kill()
            return StressTestReport(Counter({"while saving": kills}), 1, 1000, Counter(differences))

    monkeypatch.setattr(fit_rows, "ResumeStressTest", Resumed)
    live: list[Values] = []
    with listening(live.append):
        values, reason = collect(measure_resume(context_in(tmp_path), ("--x=1",), kills=3))
    assert live == [{"kills": 1}]  # kept if the row is stopped
    assert values == {"kills": 3, "bits compared": 1000, "values that differ": len(differences)}
    assert ("/state_dict/head (3)" in reason) == bool(differences)
    assert bool(reason) == bool(differences)


@pytest.mark.parametrize("reached", [True, False])
def test_time_to_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reached: bool) -> None:
    points = [
        {"step": 50, "loss": 1.5, "seconds": 9.0},
        {"step": 100, "loss": 1.46 if reached else 1.6, "seconds": 15.0},
    ]
    probe = {"reached": reached, "points": points, "first_step_seconds": 6.0}
    commands: list[tuple[str, ...]] = []

    def fit(context: Any, *flags: str) -> RunFolder:
        commands.append(flags)
        (tmp_path / PROBE_FILE).write_text(json.dumps(probe), encoding="utf-8")
        return RunFolder(tmp_path)

    monkeypatch.setattr(fit_rows, "start_fit", fit)
    values, reason = collect(measure_time_to_loss(context_in(tmp_path), ("--x=1",), 1.4697))
    assert (values["training s"], values["training s without first step"], values["steps"]) == (15, 9, 100)
    assert reason == ("" if reached else "the validation loss did not reach 1.4697; the lowest was 1.5000")
    assert commands[0][-1] == "--trainer.callbacks.target=1.4697"


def test_cost_and_synchronizations_of_callbacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Steps 8 to 12 are profiled, 11 and 12 without callbacks; step 9 is logged.

    Steps with callbacks synchronize once, the logged step four times; one of the others synchronizes, too.
    """

    def event(name: str, ts: float, cat: str) -> dict[str, Any]:
        return {"ph": "X", "name": name, "ts": ts, "dur": 1, "cat": cat}

    marks = [event(f"{STEP_MARK}{step}", 100.0 * step, "user_annotation") for step in (8, 9, 10, 11, 12, 13)]
    calls = [event("cudaStreamSynchronize", 100.0 * step + 50, "cuda_runtime") for step in (8, 9, 9, 9, 9, 10, 12)]

    def fit(context: Any, *flags: str) -> RunFolder:
        assert flags[-1] == "--trainer.max_steps=93"  # 8 + 2 * 12 + 6 * 10 + 1
        times = {"seconds_per_step": {"with": 0.2, "without": 0.15}, "log_every_n_steps": 10, "first_step_without": 11}
        (tmp_path / PROBE_FILE).write_text(json.dumps(times), encoding="utf-8")
        with gzip.open(tmp_path / TRACE_FILE, "wt") as file:
            json.dump({"traceEvents": [*marks, *calls]}, file)
        return RunFolder(tmp_path)

    monkeypatch.setattr(fit_rows, "start_fit", fit)
    sizes = {"warmup": 8, "profiled": 12, "blocks": 6, "block_steps": 10, "trace": "kept"}
    values, reason = collect(measure_callback_cost(context_in(tmp_path), ("--x=1",), **sizes))
    assert not reason
    assert values["ms per step"] == pytest.approx(200)
    assert values["share of callbacks"] == pytest.approx(0.25)
    assert values["cudaStreamSynchronize per ordinary step"] == 1
    assert values["cudaStreamSynchronize per logged step"] == 4
    assert values["cudaStreamSynchronize of callbacks per ordinary step"] == 0.5
    assert "cudaStreamSynchronize of callbacks per logged step" not in values  # none is known without callbacks
    assert values["synchronizations per logged step from"] == "no annotation: cudaStreamSynchronize 4"
    assert (tmp_path / str(values["trace"])).name == "kept.json.gz"
    assert float(str(values["trace MB"])) > 0
    assert values["copies to host per logged step"] == 0
