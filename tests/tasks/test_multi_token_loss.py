"""The auxiliary loss of multi-token prediction: gradient, metrics, chunks, and other tasks."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn import functional as F

from lit_gpt_scratch.batch_types import IGNORE_INDEX, Batch
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.packing import PACKING_POLICIES, PackingPolicy
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.lora import LoRA
from lit_gpt_scratch.tasks import DPO, LanguageModel
from tests.conftest import TINY
from tests.tasks.test_language_model import read

Build = Callable[..., L.Trainer]
GPT_AHEAD = replace(TINY, multi_token_depth=2, initialisation="gpt2")
WEIGHT = 0.4


def summed_losses(net: GPT, batch: Batch, data: PackedText) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of the next token and the mean of those of the tokens further ahead, one position at a time."""
    ids, labels, documents = batch["input_ids"], batch["labels"], batch.get("document_ids")
    ahead = torch.zeros((), dtype=torch.float64)
    logits = net.multi_token_logits(ids, documents)
    first = F.cross_entropy(logits[0].flatten(0, 1), labels.flatten(), reduction="sum")
    for depth in (1, 2):
        for b in range(len(ids)):
            for t in range(ids.size(1) - depth):
                span, label = ids[b, t + 1 : t + depth + 1], labels[b, t + depth]
                if documents is not None:
                    inside = bool((documents[b, t : t + depth + 1] == documents[b, t]).all())
                else:  # consecutive tokens of a stream without padding
                    inside = data.info.start_of_text not in span.tolist()
                starts = label == data.info.start_of_text != data.info.end_of_text
                if inside and not starts and label != IGNORE_INDEX:
                    ahead = ahead + F.cross_entropy(logits[depth][b, t], label) / 2
    return first, ahead


class Compare(L.Callback):
    """Compares the gradient and the losses of each step with those of all micro-batches since the last step."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.losses: list[float] = []
        self.steps = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.configure_gradient_clipping = lambda *_, **__: self.compare(trainer, pl_module.net)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, _: int) -> None:
        self.batches.append(batch)

    def compare(self, trainer: L.Trainer, net: GPT) -> None:
        with torch.enable_grad():
            parts = [summed_losses(net, batch, trainer.datamodule) for batch in self.batches]
            first, ahead = (sum(part) for part in zip(*parts, strict=True))
            count = sum((batch["labels"] != IGNORE_INDEX).sum() for batch in self.batches)
            expected = torch.autograd.grad((first + WEIGHT * ahead) / count, list(net.parameters()))
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-10, rtol=1e-8)
        logged = trainer.logged_metrics
        assert logged["train/loss"].item() == pytest.approx((first / count).item(), rel=1e-6)
        assert logged["train/multi_token_loss"].item() == pytest.approx((ahead / count).item(), rel=1e-6)
        self.batches, self.steps = [], self.steps + 1


@pytest.mark.parametrize("chunk_mb", [None, 0.02])
@pytest.mark.parametrize(
    ("policy", "document_mask"), [*((policy, True) for policy in PACKING_POLICIES), ("concatenate", False)]
)
def test_gradient_and_metrics_are_those_of_the_mean_over_a_steps_labels(
    trainer: Build,
    packed_text: Callable[..., PackedText],
    policy: PackingPolicy,
    document_mask: bool,
    chunk_mb: float | None,
) -> None:
    """The steps have three and one micro-batches."""
    task = LanguageModel(GPT_AHEAD, compile=False, multi_token_weight=WEIGHT, max_logits_mb=chunk_mb)
    compare = Compare()
    run = trainer(
        max_steps=-1, max_epochs=1, limit_train_batches=4, accumulate_grad_batches=3, callbacks=[compare],
        limit_val_batches=0, log_every_n_steps=1, precision="64-true",
    )  # fmt: skip
    run.fit(task, packed_text(packing=policy, batch_size=2, document_mask=document_mask))
    assert compare.steps == 2


def test_validation_logs_both_losses(trainer: Build, packed_text: Callable[..., PackedText], tmp_path: Path) -> None:
    task, data = LanguageModel(GPT_AHEAD, compile=False, multi_token_weight=WEIGHT), packed_text(document_mask=True)
    logger = TensorBoardLogger(tmp_path)
    run = trainer(max_steps=4, val_check_interval=2, log_every_n_steps=1, logger=logger, precision="64-true")
    run.fit(task, data)
    with torch.no_grad():
        batches = list(data.val_dataloader())
        parts = [summed_losses(task.net.eval(), batch, data) for batch in batches]
    count = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    logged = read(logger.log_dir)
    for name, part in zip(("loss", "multi_token_loss"), zip(*parts, strict=True), strict=True):
        assert logged[f"val/{name}"][-1][1] == pytest.approx(sum(part).item() / count, rel=1e-5)
        assert len(logged[f"val/{name}"]) == 2
        assert len(logged[f"train/{name}"]) == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DPO(gpt=GPT_AHEAD), "multi_token_depth is 2, but DPO does not predict several tokens; set it to 0"),
        (lambda: LanguageModel(GPT_AHEAD, lora=LoRA()), "model.lora and model.train_layers would freeze"),
        (lambda: LanguageModel(GPT_AHEAD, train_layers=1), "model.lora and model.train_layers would freeze"),
        (lambda: LanguageModel(multi_token_weight=0.0), "multi_token_weight is 0.0; it must be positive"),
        (lambda: LanguageModel(multi_token_weight=float("nan")), "multi_token_weight is nan; it must be positive"),
    ],
)
def test_contradictory_settings_are_an_error(build: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build()
    assert message in str(error.value)


def test_weight_without_depth_is_an_error(trainer: Build, packed_text: Callable[..., PackedText]) -> None:
    task = LanguageModel(TINY, compile=False, multi_token_weight=0.1)
    with pytest.raises(UserError, match=r"multi_token_weight is 0\.1, but model\.gpt\.multi_token_depth is 0; set"):
        trainer().fit(task, packed_text())


def test_depth_of_the_row_length_is_an_error(trainer: Build, packed_text: Callable[..., PackedText]) -> None:
    task = LanguageModel(replace(TINY, multi_token_depth=8), compile=False)
    with pytest.raises(UserError, match=r"multi_token_depth is 8, but data\.block_size is 8"):
        trainer().fit(task, packed_text(block_size=8))
