"""The fine-tuning experiments, unchanged, for two steps from their base model."""

import json
from pathlib import Path

import numpy as np
import pytest

from lit_gpt_scratch.checkpoint.compare_checkpoints import read_curves
from lit_gpt_scratch.checkpoint.loading import build_model, load_checkpoint
from lit_gpt_scratch.data import LabelledText
from lit_gpt_scratch.evaluation.classification_eval import classify
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


def test_classification_stops_early_and_tests_its_best_checkpoint(command: Command, cache: Path) -> None:
    """With a learning rate so high that later epochs are worse, the test metrics are those of an earlier checkpoint."""
    flags = [
        "--model=Classification", "--data=LabelledText", f"--data.cache={cache}", "--data.vocab_size=300",
        "--model.gpt.n_layer=1", "--model.gpt.n_head=2", "--model.gpt.n_embd=16", "--model.compile=false",
        "--model.optimizer.adamw_lr=1.0", "--model.patience=2", "--data.batch_size=32", "--trainer.accelerator=cpu",
        "--inspect.every_n_steps=0", "--guard=off",
    ]  # fmt: skip
    outcome = command("fit", *flags, "--experiment=classes")
    assert outcome.code == 0, outcome.err
    run = Path("runs/classes/version_0")
    losses = dict(read_curves(run)["val/loss"])
    best = min(losses, key=lambda step: float(losses[step]))
    [checkpoint] = run.glob("checkpoints/step=*.ckpt")
    assert checkpoint.name == f"step={best + 1}.ckpt"
    epochs = sorted(losses)
    assert epochs.index(best) == len(epochs) - 3 < 7  # two more epochs, fewer than the default of 8 in all
    assert f"testing {checkpoint.name}, which has the lowest validation loss" in outcome.err
    assert f"evaluate {checkpoint}" in outcome.err

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    data = LabelledText(cache=str(cache), vocab_size=300)
    data.setup("test")
    trained = build_model(load_checkpoint(checkpoint), checkpoint)
    texts, labels = data.labelled_texts("test")
    predicted = classify(trained.net, trained.tokenizer, texts, "mean").argmax(-1)
    assert summary["test/accuracy"] == pytest.approx((predicted == np.array(labels)).mean())
