"""A run resumed from a checkpoint of any hook has the batches, steps and validations of an uninterrupted one."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lit_gpt_scratch.callbacks.checkpointing import ValidateAtEnd
from lit_gpt_scratch.checkpoint.loop_state import count_finished_epochs, normalize_progress
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.tasks import LanguageModel

HOOKS = ["on_train_batch_start", "on_train_batch_end", "on_validation_start", "on_validation_end", "on_train_epoch_end"]


class SaveInHook(L.Callback):
    """Save a checkpoint each time a hook is called."""

    def __init__(self, hook: str, folder: Path) -> None:
        self.folder, self.saved = folder, list[Path]()
        setattr(self, hook, self._save)

    def _save(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step:
            self.saved.append(self.folder / f"{len(self.saved)}-{trainer.global_step}.ckpt")
            trainer.save_checkpoint(self.saved[-1])


class BatchRecorder(L.Callback):
    """Records which batches were seen."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.batches.append(int(args[2]["input_ids"].sum()))


@pytest.mark.parametrize("ema_decay", [pytest.param(None, marks=pytest.mark.slow), 0.8])
@pytest.mark.parametrize("hook", HOOKS)
def test_checkpoints_of_all_hooks_resume_identically(
    trainer: Callable[..., L.Trainer],
    packed_text: Callable[..., PackedText],
    tmp_path: Path,
    hook: str,
    ema_decay: float | None,
) -> None:
    """Epochs have 5 batches and a validation runs every 3, so some are at the end of an epoch and some are not."""

    def run(checkpoint: Path | None, *callbacks: L.Callback) -> tuple[dict[str, torch.Tensor], BatchRecorder]:
        trace = BatchRecorder()
        L.seed_everything(3)
        gpt = GPTConfig(n_layer=1, n_head=2, n_embd=32, dropout=0.2)
        model = LanguageModel(gpt, ema_decay=ema_decay, compile=False)
        of_run = trainer(
            max_steps=17,
            limit_train_batches=5,
            val_check_interval=3,
            limit_val_batches=2,
            check_val_every_n_epoch=None,
            callbacks=[ValidateAtEnd(), trace, *callbacks],
        )
        of_run.fit(model, packed_text(), ckpt_path=checkpoint, weights_only=True)
        assert of_run.global_step == 17
        return {name: value.clone() for name, value in model.state_dict().items()}, trace

    saving = SaveInHook(hook, tmp_path)
    uninterrupted, expected = run(None, saving)
    assert len(saving.saved) > 2
    for path in saving.saved[:: max(1, len(saving.saved) // 5)]:
        loaded = torch.load(path, weights_only=True)
        step = loaded["global_step"]
        if step == 17:
            continue
        resumed, trace = run(path)
        assert trace.batches == expected.batches[step:], path
        assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted), path


def test_normalizing_is_idempotent(
    trainer: Callable[..., L.Trainer], packed_text: Callable[..., PackedText], task: Callable[..., Any], tmp_path: Path
) -> None:
    saving = SaveInHook("on_train_batch_end", tmp_path)
    trainer(max_steps=9, limit_train_batches=4, callbacks=[saving]).fit(task(), packed_text())
    for step, path in enumerate(saving.saved, start=1):
        loop = torch.load(path, weights_only=True)["loops"]["fit_loop"]
        normalize_progress(loop)
        once = deepcopy(loop)
        normalize_progress(loop)
        assert loop == once
        assert count_finished_epochs(loop) == step // 4
        assert loop["epoch_loop.batch_progress"]["current"]["completed"] == step % 4
