"""The fine-tuning experiments, unchanged, for two steps from their base model."""

import json
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command, Trained

FOLDER = Path(__file__).parents[2] / "experiments/finetune"
STAGES = sorted({path.stem for path in FOLDER.glob("*.yaml")} - {"base"})
SHORT = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.limit_val_batches=1"]


@pytest.mark.parametrize("name", STAGES)
def test_experiment_starts_from_its_base_model(
    command: Command, trained: Trained, name: str, corpus: Path, cache: Path
) -> None:
    """On synthetic records; with LoRA few parameters are trained."""
    flags = [f"--data.source={corpus}", f"--data.cache={cache}", "--data.validation_share=0.1", "--data.vocab_size=300"]
    trained(f"--config={FOLDER / 'base.yaml'}", *flags, *SHORT)
    flags = [f"--config={FOLDER / name}.yaml", "--model.init_from=runs/base/version_0", "--trainer.max_epochs=null"]
    outcome = command("fit", *flags, *SHORT)
    assert outcome.code == 0, outcome.err
    summary = json.loads(Path("runs", name, "version_0", "summary.json").read_text(encoding="utf-8"))
    assert summary["test/loss"] > 0
    assert ("test/accuracy" in summary) == name.startswith("spam")
    assert ("; new head; " in outcome.err) == name.startswith("spam")
    share = summary["trained_parameters"] / summary["parameters"]
    assert share < 0.05 if name.endswith("_lora") else share == 1
