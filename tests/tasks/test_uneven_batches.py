"""In float64, the gradient of uneven micro-batches equals that of one large batch in every stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_gpt_scratch.data import Conversations, LabelledText, PackedText, Preferences, Prompts
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.tasks import DPO, GRPO, PPO, Classification, LanguageModel, Reward
from tests.conftest import sentences

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, initialisation="gpt2")
RL = {"reward": "tests.custom_reward.even_tokens", "steps_per_phase": 1, "passes": 1}
STAGES: dict[str, tuple[type[L.LightningModule], dict[str, Any], type[L.LightningDataModule], dict[str, Any]]] = {
    "pretraining": (LanguageModel, {}, PackedText, {"packing": "one_document", "vocab_size": 300}),
    "instructions": (LanguageModel, {}, Conversations, {}),
    "classes": (Classification, {}, LabelledText, {}),
    "weighted classes": (Classification, {"class_weights": "balanced"}, LabelledText, {}),
    "reward model": (Reward, {}, Preferences, {}),
    "DPO": (DPO, {}, Preferences, {}),
    "PPO": (PPO, RL, Prompts, {"reply_tokens": 8}),
    "GRPO": (GRPO, RL | {"group": 3}, Prompts, {"reply_tokens": 8}),
}


class FirstGradient(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.gradient: list[Tensor] = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_equals_that_of_one_large_batch(
    trainer: Callable[..., L.Trainer], cache: Path, tmp_path: Path, stage: str
) -> None:
    task, task_settings, data, data_settings = STAGES[stage]
    for seed in range(30):
        (tmp_path / f"{seed}.txt").write_text(sentences(seed, 1 + seed % 7), encoding="utf-8")
    source = {"source": str(tmp_path)} if data is PackedText else {}
    found = []
    for batch_size, accumulate in ((6, 1), (2, 3)):
        L.seed_everything(0)
        seen = FirstGradient()
        run = trainer(
            max_steps=1, limit_val_batches=0, precision="64-true", accumulate_grad_batches=accumulate, callbacks=[seen]
        )
        settings = {"block_size": 96, "batch_size": batch_size, "cache": str(cache), **source, **data_settings}
        run.fit(task(gpt=SHAPE, compile=False, **task_settings), data(**settings))
        assert {part.dtype for part in seen.gradient} == {torch.float64}
        found.append(torch.cat([part.flatten() for part in seen.gradient]))
    one, several = found
    assert one.abs().max() > 1e-6
    assert (one - several).abs().max() <= 1e-12 * one.abs().max()
