"""What this package takes for granted of Lightning, torch and TensorBoard: a new version that changes it fails here.

Facts that other tests hold already are not repeated: the order of ranks (``test_multi_process``), counters and hooks
of a resumed run (``checkpoint/test_loop_state.py``), the copy that a background save works on
(``checkpoint/test_checkpoint_io.py``),
a swapped class that keeps same-named arguments (``end_to_end/test_commands.py``).
"""

import inspect
import random
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.tensorboard import SummaryWriter

from lit_gpt_scratch.checkpoint.compare_checkpoints import read_curves
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.tasks import LanguageModel

Build = Callable[..., Any]


class Hooks(L.Callback):
    """Write down hooks, and what the trainer says in them."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(("start", signal.getsignal(signal.SIGTERM)))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(("batch", trainer.fit_loop.epoch_loop.total_batch_idx))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(("validation", trainer.global_step))


def test_a_validation_interval_counts_micro_batches(trainer: Build, task: Build, packed_text: Build) -> None:
    hooks = Hooks()
    flags = {"val_check_interval": 4, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2, "max_steps": 5}
    trainer(callbacks=[hooks], **flags).fit(task(), packed_text())
    assert [step for name, step in hooks.seen if name == "validation"] == [2, 4]
    assert [place for name, place in hooks.seen if name == "batch"] == list(range(10))


def test_random_numbers_are_not_restored(trainer: Build, packed_text: Build, task: Build, tmp_path: Path) -> None:
    """If they were, ``tasks.base.Task`` would have nothing to do."""
    run = trainer(max_steps=2)
    run.fit(task(), packed_text())
    run.save_checkpoint(tmp_path / "x.ckpt")
    assert not any("rng" in name or "random" in name for name in torch.load(tmp_path / "x.ckpt", weights_only=True))


def test_a_task_draws_its_random_numbers_from_their_place(
    trainer: Build, packed_text: Build, task: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, float, float]] = []
    step = LanguageModel.training_step

    def note(self: LanguageModel, *args: Any) -> torch.Tensor:
        drawn.append((torch.rand(()).item(), random.random(), float(np.random.rand())))  # noqa: NPY002 - what is seeded
        return step(self, *args)

    monkeypatch.setattr(LanguageModel, "training_step", note)
    for _ in range(2):
        L.seed_everything(1)
        torch.rand(len(drawn))  # whatever was drawn before
        trainer(max_steps=3).fit(task(), packed_text())
    assert drawn[:3] == drawn[3:]
    assert len(set(drawn)) == 3


def test_lightning_puts_its_handlers_before_training_and_the_former_back(
    trainer: Build, task: Build, packed_text: Build
) -> None:
    """By a method that ``SignalHandling`` puts another in the place of, and what was before comes back."""
    hooks, before = Hooks(), signal.getsignal(signal.SIGTERM)
    trainer(max_steps=1, callbacks=[hooks]).fit(task(), packed_text())
    assert hooks.seen[0][1] != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_launcher_kills_all_when_a_process_of_its_own_fails() -> None:
    """So ranks that were started by another end with 0 when a signal stops a run."""
    source = inspect.getsource(subprocess_script._ChildProcessObserver._run)
    assert "if proc.returncode:" in source
    assert "self._terminate_all()" in source


def test_callbacks_that_save_come_last() -> None:
    order = L.Trainer(accelerator="cpu", logger=False, callbacks=[Checkpoint(), Hooks()]).callbacks
    assert isinstance(order[-1], Checkpoint)


def test_a_run_that_has_all_its_steps_calls_no_hook(trainer: Build, task: Build, packed_text: Build) -> None:
    """So one of which only the last validation is missing has to ask for a step more."""
    hooks, run = Hooks(), trainer(max_steps=2)
    run.fit(task(), packed_text())
    run.callbacks.append(hooks)
    run.fit(task(), packed_text())
    assert hooks.seen == []


def test_a_checkpoint_of_torch_is_a_zip_archive_that_passes_over_a_comment(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3)}, tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "x", "a") as archive:
        assert archive.comment == b""
        archive.comment = b"sha256:" + b"0" * 64
    assert torch.load(tmp_path / "x", weights_only=True)["x"].sum() == 3


def test_tensorboard_purges_from_a_step_on(tmp_path: Path) -> None:
    """What was logged before is purged where a session begins, if the first one said that it began, too."""
    for first, purge in ((0, 0), (3, 3)):
        with SummaryWriter(str(tmp_path), purge_step=purge, filename_suffix=f".{first}") as writer:
            for step in range(first, first + 5):
                writer.add_scalar("x", first, step)
    assert read_curves(tmp_path) == {"x": [(n, "0.0") for n in range(3)] + [(n, "3.0") for n in range(3, 8)]}


def test_a_stopped_trainer_is_started_by_ckpt_path_last_with_nothing(
    trainer: Build, task: Build, packed_text: Callable[..., PackedText], recwarn: pytest.WarningsRecorder
) -> None:
    """``fit --ckpt_path last`` therefore looks for itself."""
    run = trainer(max_steps=1)
    run.fit(task(), packed_text(), ckpt_path="last")
    assert any("no last checkpoint available" in str(warning.message) for warning in recwarn)
    assert run.global_step == 1
