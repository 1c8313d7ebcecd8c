"""Runs with an exponential moving average: validation, checkpoints and resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_gpt_scratch.callbacks.checkpointing import ValidateAtEnd
from lit_gpt_scratch.checkpoint.loading import load_model
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.tasks import LanguageModel

DECAY = 0.6
TIED = GPTConfig(n_layer=1, n_head=2, n_embd=32, tied_embeddings=True)


class Recursion(L.Callback):
    """Averages by the equation, and saves in many hooks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trained: dict[int, dict[str, Tensor]] = {}
        self.expected: dict[int, dict[str, Tensor]] = {}
        self.saved: list[Path] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        step = trainer.global_step
        now = {name: value.clone() for name, value in pl_module.state_dict().items()}
        keep, before = min(DECAY, step / (9 + step)), self.expected.get(step - 1, now)
        self.expected[step] = {name: keep * before[name] + (1 - keep) * value for name, value in now.items()}
        self.trained[step] = now
        self.save(trainer, "step")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer, "before")

    def on_validation_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        self.save(trainer, "during")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer, "after")

    def save(self, trainer: L.Trainer, when: str) -> None:
        path = self.folder / f"{when}-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append(path)


@pytest.fixture
def run(
    trainer: Callable[..., L.Trainer], packed_text: Callable[..., PackedText], task: Callable[..., LanguageModel]
) -> Callable[..., tuple[L.Trainer, LanguageModel, PackedText]]:
    """Train a small tied model with an average."""

    def fit(ema_decay: float | None = DECAY, ckpt_path: Path | None = None, **flags: Any) -> Any:
        L.seed_everything(0)
        model, data = task(gpt=TIED, ema_decay=ema_decay), packed_text()
        of_run = trainer(**{"max_steps": 9, "val_check_interval": 3, "check_val_every_n_epoch": None, **flags})
        of_run.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        return of_run, model, data

    return fit


def test_every_checkpoint_has_the_average_as_its_weights(run: Callable[..., Any], tmp_path: Path) -> None:
    """Whether it was saved between two steps or during a validation."""
    recursion = Recursion(tmp_path)
    _, model, _ = run(callbacks=[ValidateAtEnd(), recursion])
    assert {path.stem for path in recursion.saved} >= {"step-1", "before-3", "during-3", "after-3", "step-9", "after-9"}
    named = dict(model.named_parameters())
    for path in set(recursion.saved):
        saved = torch.load(path, weights_only=True)
        expected, trained = (made[saved["global_step"]] for made in (recursion.expected, recursion.trained))
        for name, weight in saved["state_dict"].items():
            torch.testing.assert_close(weight, expected[name], msg=f"{path.name} {name}")
        averages = [state["average"] for state in saved["optimizer_states"][0]["state"].values()]
        assert len(averages) == len(named)
        assert all(any(torch.equal(kept, weight) for weight in trained.values()) for kept in averages)


def test_average_is_used_in_validation_and_does_not_affect_training(run: Callable[..., Any], tmp_path: Path) -> None:
    recursion, plain = Recursion(tmp_path), Recursion(tmp_path)
    averaged, model, data = run(callbacks=[ValidateAtEnd(), recursion])
    run(ema_decay=None, callbacks=[ValidateAtEnd(), plain])
    for step, weights in plain.trained.items():
        assert all(torch.equal(weight, recursion.trained[step][name]) for name, weight in weights.items())
    last = tmp_path / "last.ckpt"
    averaged.save_checkpoint(last)  # the run is over, and the average has taken the weights' place
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, recursion.expected[9][name])
    loss = averaged.callback_metrics["val/loss"].item()
    assert averaged.validate(model, data, verbose=False)[0]["val/loss"] == pytest.approx(loss)
    assert averaged.validate(model, data, last, verbose=False, weights_only=True)[0]["val/loss"] == pytest.approx(loss)
    assert torch.equal(load_model(last)[0].head.weight, model.net.head.weight)


def test_averaging_can_start_in_a_resumed_run_but_not_end(run: Callable[..., Any], tmp_path: Path) -> None:
    first, _, _ = run(ema_decay=None, max_steps=4)
    first.save_checkpoint(tmp_path / "plain.ckpt")
    later, _, _ = run(ckpt_path=tmp_path / "plain.ckpt", max_steps=6)
    later.save_checkpoint(tmp_path / "averaged.ckpt")
    assert torch.load(tmp_path / "averaged.ckpt", weights_only=True)["averaged"]
    with pytest.raises(UserError, match="the checkpoint contains EMA weights"):
        run(ema_decay=None, ckpt_path=tmp_path / "averaged.ckpt", max_steps=8)
