"""Ladders of the stub: the largest run is predicted before it starts, and the report says whether it was right."""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.fit_command import ResolvedBaseline, build_arguments
from lit_gpt_scratch.sweeps.scaling_law import MeasuredPoint, Prediction
from lit_gpt_scratch.sweeps.scaling_report import ScalingAnalysis
from lit_gpt_scratch.sweeps.sweep_config import load_sweep
from tests.sweeps.conftest import RunSweep, read_pids, read_rows
from tests.sweeps.stub_fit import scaling_loss

LADDER = """
# How does the loss fall?
vary:
  parameters: [1e5, 3e5, 9e5]
  budget.steps: [1000, 2000, 4000]
seeds: [1, 2]
scaling: {hold_out: {parameters: 9e5, budget.steps: 4000}}
"""


def started_at(folder: Path) -> datetime:
    return datetime.fromisoformat(json.loads((folder / "provenance.json").read_text())["sessions"][0]["started"])


def test_held_out_trial_is_predicted_before_it_starts(run_sweep: RunSweep, tmp_path: Path) -> None:
    assert run_sweep(LADDER, "--workers", "2") == 0
    runs = tmp_path / "runs" / "s"
    prediction = json.loads((runs / "prediction.json").read_text())
    assert prediction["parameters"] == 9e5
    assert prediction["tokens"] == 4e5
    assert prediction["flops"] == 6 * 9e5 * 4e5
    assert prediction["n_runs"] == 16
    rows = read_rows(tmp_path / "runs", "s")
    assert [row["trial"] for row in rows[-2:]] == ["8", "8"]
    assert {(float(row["parameters"]), row["budget.steps"]) for row in rows[-2:]} == {(9e5, "4000")}
    predicted_at = datetime.fromisoformat(prediction["predicted_at"])
    folders = sorted(runs.glob("*/version_0"), key=started_at)
    assert {folder.parent.name.partition("_seed")[0] for folder in folders[-2:]} == {"9e5_4000"}
    assert started_at(folders[-3]) < started_at(folders[-2])
    assert predicted_at <= started_at(folders[-2])
    mean = (scaling_loss(9e5, 4e5, 1) + scaling_loss(9e5, 4e5, 2)) / 2
    assert prediction["low"] < mean < prediction["high"]
    assert prediction["high"] - prediction["low"] < 0.06

    text = (runs / "report.md").read_text()
    page = (runs / "report.html").read_text()
    for report in (text, page):
        assert f"measured {mean:.3f} (mean of 2 runs): inside." in report.replace("\\", "")
        assert "p (Holm)" not in report
    assert re.findall(r"\((\w+)\.svg\)", text)[:3] == ["loss_over_compute", "isoflops", "predictions"]
    assert page.count("<svg") >= 3
    for title in ("Loss over compute", "Loss at constant compute", "Predicted and measured loss"):
        assert title in page
    assert "| held out | 900K | 400K |" in text
    law = json.loads((runs / "scaling_law.json").read_text())
    assert law["origin"] == "the runs of python -m lit_gpt_scratch.sweep s.yaml"
    assert law["metric"] == "val/bits_per_byte"
    assert law["law"].keys() - law["intervals"].keys() == {"gamma"}
    assert law["law"]["gamma"] == 1.0
    assert law["cost"]["factor"] == pytest.approx(6)
    assert law["n_runs"] == 16

    before = read_pids(tmp_path / "runs", "s"), (runs / "prediction.json").read_bytes()
    assert run_sweep(LADDER) == 0
    assert before == (read_pids(tmp_path / "runs", "s"), (runs / "prediction.json").read_bytes())


def test_held_out_trial_waits_for_runs_that_are_to_be_retried(run_sweep: RunSweep, tmp_path: Path) -> None:
    text = f"fixed: {{fails: 2, failure: killed}}{LADDER}"
    assert run_sweep(text) == 1
    assert not (tmp_path / "runs" / "s" / "prediction.json").exists()
    assert "9e5_4000" not in str(list((tmp_path / "runs" / "s").iterdir()))
    (tmp_path / "repaired").touch()
    assert run_sweep(text) == 0
    assert json.loads((tmp_path / "runs" / "s" / "prediction.json").read_text())["n_runs"] == 16


def test_runs_without_sizes(run_sweep: RunSweep, capsys: pytest.CaptureFixture[str]) -> None:
    text = LADDER.replace("parameters", "x")
    assert run_sweep(text) == 2
    assert "does not record parameters, as language models do" in capsys.readouterr().err.splitlines()[-1]


def test_tokens_may_vary_per_trial(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("vary:\n  data.batch_size: [4, 16]\n  budget.tokens: [64e3, 128e3]\n")
    known = ResolvedBaseline({"data.batch_size": 8, "data.block_size": 100, "trainer.accumulate_grad_batches": 1})
    sweep = load_sweep(path)
    found = [build_arguments(sweep, each, known) for each in sweep.predefined_assignments]
    assert [each[-1] for each in found] == [f"--trainer.max_steps={n}" for n in (160, 320, 40, 80)]
    assert build_arguments(sweep, sweep.baseline_assignment, None) == ["--data.batch_size=4"]


GRID = "vary: {size: {s: {a: 1}, m: {a: 2}, l: {a: 3}}, budget.tokens: [1, 2, 3]}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID + "scaling: {hold_out: {size: xl, budget.tokens: 3}}", "size is xl; it must be one of the settings"),
        (GRID + "scaling: {hold_out: {size: l}}", "hold_out has no budget.tokens; it must name a setting of each"),
        (GRID + "scaling: {hold_out: {size: l, budget.tokens: 3, b: 1}}", "hold_out: b is not listed under vary"),
        (GRID + "scaling: {hold_out: {size: l, budget.tokens: 3, 1: 1}}", "hold_out: 1 is not listed under vary"),
        (GRID + "scaling: {hold_out: {size: s, budget.tokens: 1}}", "hold_out is the baseline"),
        (GRID + "scaling: {hold_out: l}", "hold_out is l; it must be a mapping of dimensions to settings"),
        (GRID + "scaling: {holdout: {}}", "unknown key holdout; the only valid key is hold_out"),
        (GRID + "scaling: [1]", "scaling is [1]; it must be a mapping"),
        (
            GRID + "scaling: {}\nmethod: tpe\ntrials: 9",
            "method is tpe; the sizes and training lengths",
        ),
        (GRID.replace(", l: {a: 3}", "") + "scaling: {}", "vary has 2 different sizes, but the coefficients"),
        (GRID + "scaling: {}\ndirection: maximize", "direction is maximize; the law describes a loss"),
        (GRID.replace("tokens", "minutes") + "scaling: {}", "tokens of a run in minutes is unknown"),
        (GRID.replace("budget.tokens", "trainer.max_time") + "scaling: {}", "vary budget.tokens"),
        (GRID.replace("[1, 2, 3]", "[1, 2]") + "scaling: {}", "vary has 2 different training lengths"),
        ("vary: {a: [1, 2, 3]}\nscaling: {}", "vary has no different training lengths"),
        ("vary: {budget.token: [1]}", "budget is token; it must be one of steps, tokens, minutes"),
        ("vary: {budget.tokens: [-1]}", "budget: tokens is -1; it must be positive"),
        ("vary: {budget.tokens: [x]}", "budget: tokens is x; it must be a number"),
        ("vary: {budget.tokens: [1]}\nbudget: {steps: 2}", "steps and tokens both set trainer.max_steps"),
        ("vary: {budget.tokens: [1]}\nfixed: {trainer.max_steps: 2}", "which is also listed under fixed or vary"),
    ],
)
def test_invalid_ladder(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_sweep(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sweep_without_scaling_keeps_its_study(tmp_path: Path) -> None:
    """The hash in the name of a study does not contain a key that older sweep files do not have."""
    path = tmp_path / "s.yaml"
    path.write_text("vary: {a: [1, 2]}\n")
    assert load_sweep(path).fingerprint == "e19a0a10"


@pytest.mark.parametrize(
    ("measured", "started", "verdict"),
    [
        ((1.50, 1.52), "2026-01-01T00:00:01+00:00", "inside"),
        ((1.60, 1.62), "2026-01-01T00:00:01+00:00", "outside"),
        ((1.50, 1.52), "2025-12-31T23:59:59+00:00", "not a prediction: the run had started before it was made"),
        ((1.50, 1.52), "", "not verified: the time at which the run started is unknown"),
        ((1.50, 1.52), "yesterday", "not verified: the time at which the run started is unknown"),
        ((1.50, 1.52), "2026-01-01T00:00:01", "not verified: the time at which the run started is unknown"),
        (None, "", "not measured yet"),
    ],
)
def test_verdict(measured: tuple[float, ...] | None, started: str, verdict: str) -> None:
    prediction = Prediction("2026-01-01T00:00:00+00:00", 1e6, 1e6, 6e12, 1.51, 1.49, 1.53, 0.9, 22)
    held_out = MeasuredPoint(1e6, 1e6, 6e6, measured) if measured else None
    assert ScalingAnalysis({}, "", held_out, prediction, started).verdict == verdict
    assert ScalingAnalysis({}, "", held_out, None).verdict == "not predicted yet"
