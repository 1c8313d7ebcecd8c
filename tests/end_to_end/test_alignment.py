"""The README's alignment experiments, unchanged, with a preference that can be verified."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Command, Trained

ALIGN = Path(__file__).parents[2] / "experiments/align"


@pytest.mark.slow
def test_dropout_of_the_initial_model_is_disabled(
    command: Command, trained: Trained, staged: Callable[[str], list[str]]
) -> None:
    """It is in the initial model's config and is ignored; dropout set by a flag is an error."""
    trained(*staged("instructions"), "--model.gpt.dropout=0.1", "--trainer.max_steps=2")
    flags = ["--model=GRPO", "--data=Prompts", "--data.reply_tokens=4", "--data.block_size=96", "--model.group=4"]
    flags += ["--model.init_from=runs/pretrain/version_0", "--model.compile=false", "--trainer.accelerator=cpu"]
    done = command("fit", *flags, "--trainer.fast_dev_run=1")
    assert done.code == 0, done.err
    outcome = command("fit", *flags, "--trainer.fast_dev_run=1", "--model.gpt.dropout=0.1")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "model.gpt.dropout is 0.1, but GRPO" in outcome.err


Fit = Callable[..., tuple[str, dict[str, Any]]]
"""Run a shipped config with more flags; returns the flag to start from its model, and its summary."""


@pytest.fixture
def fit(command: Command) -> Fit:
    def run(config: Path, *flags: str) -> tuple[str, dict[str, Any]]:
        outcome = command("fit", "--config", config, "--trainer.accelerator=cpu", *flags)
        assert outcome.code == 0, outcome.err
        folder = f"runs/{config.stem}/version_0"
        return f"--model.init_from={folder}", json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture
def start(fit: Fit, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Flag to start from an instruction-tuned model of the README's experiments; trained once, and copied."""
    kept = tmp_path_factory.getbasetemp() / "instructed"
    if not kept.exists():
        base, _ = fit(ALIGN.parent / "finetune/base.yaml")
        fit(ALIGN / "start.yaml", base)
        shutil.copytree("runs/start", kept)
    shutil.copytree(kept, "runs/start", dirs_exist_ok=True)
    return "--model.init_from=runs/start/version_0"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("config", "flags", "reached"),
    [
        ("reward", [], {"test/accuracy": 0.95}),
        ("dpo", [], {"test/accuracy": 0.95}),
        ("ppo", ["--model.reward=full_stop"], {"test/true_reward": 0.9}),
        ("grpo", ["--model.reward=full_stop"], {"test/true_reward": 0.9}),
    ],
)
def test_each_method_learns_the_preference(
    fit: Fit, start: str, config: str, flags: list[str], reached: dict[str, float]
) -> None:
    """From a model with at most two of five preferred replies; nearly all held-out pairs are ranked correctly."""
    _, summary = fit(ALIGN / f"{config}.yaml", start, *flags)
    for figure, least in reached.items():
        assert summary[figure] >= least, (figure, summary)
    if config != "reward":  # it generates nothing
        before = summary["baselines"]["true_reward"]
        assert before <= 0.4
        assert summary["test/true_reward"] >= before + 0.3
