"""LanguageModel: overfitting, determinism, gradient scaling, logging and validation metrics."""

import math
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lit_gpt_scratch.batch_types import IGNORE_INDEX, Batch
from lit_gpt_scratch.callbacks.checkpointing import ValidateAtEnd
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.packing import PACKING_POLICIES, PackingPolicy
from lit_gpt_scratch.distributed.fake_process_group import fake_mesh
from lit_gpt_scratch.distributed.hardware_defaults import explain_no_compile
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation.perplexity import score_documents
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.optim import AdamW, Muon, Schedule
from lit_gpt_scratch.tasks import LanguageModel
from tests.conftest import TINY, sentences
from tests.tokenizer_forms import FORMS, build_tokenizer

Build = Callable[..., L.Trainer]


class OneBatch(PackedText):
    """The same batch at every step."""

    def train_dataloader(self) -> DataLoader[Batch]:
        self.batch = next(iter(super().train_dataloader()))
        return DataLoader([self.batch], batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", [Muon(), AdamW(lr=1e-2)])
def test_one_batch_can_be_memorised(
    trainer: Build, packed_text: Callable[..., PackedText], optimizer: Muon | AdamW
) -> None:
    settings = packed_text()
    data = OneBatch(
        settings.preparation.selection.name, vocab_size=300, block_size=32, batch_size=4, cache=str(settings.cache)
    )
    gpt = GPTConfig(n_layer=2, n_head=2, n_embd=64)
    model = LanguageModel(gpt, optimizer, Schedule(warmup_steps=5), compile=False)
    trainer(max_steps=150, limit_val_batches=0, gradient_clip_val=1.0).fit(model, data)
    nats, tokens = token_cross_entropy(model.net.eval()(data.batch["input_ids"]), data.batch["labels"])
    assert (nats / tokens).item() < 0.05, (nats / tokens).item()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_runs_with_one_seed_are_bit_identical(
    trainer: Build, task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText], num_workers: int
) -> None:
    def weights(seed: int, workers: int) -> dict[str, torch.Tensor]:
        L.seed_everything(seed)
        model = task(gpt=GPTConfig(n_layer=2, n_head=2, n_embd=32, dropout=0.1))
        trainer(max_steps=12).fit(model, packed_text(num_workers=workers))
        return model.state_dict()

    first, second, other = weights(1, num_workers), weights(1, 0), weights(2, 0)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def read(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_train_loss_is_the_mean_over_a_steps_micro_batches(
    trainer: Build, task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText], tmp_path: Path
) -> None:
    def losses(batch_size: int, accumulate: int) -> list[float]:
        L.seed_everything(0)
        logger = TensorBoardLogger(tmp_path, name=f"{batch_size}")
        run = trainer(max_steps=6, log_every_n_steps=1, accumulate_grad_batches=accumulate, logger=logger)
        run.fit(task(), packed_text(batch_size=batch_size))
        return [value for _, value in read(logger.log_dir)["train/loss"]]

    assert losses(8, 1) == pytest.approx(losses(2, 4), rel=1e-4)


class Gradients(L.Callback):
    """Compares each step's gradient with that of the mean over all labels since the last step."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.labels: list[list[int]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The last hook before the optimizer's own step.
        pl_module.configure_gradient_clipping = lambda *_, **__: self.compare(pl_module.net)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, _: int) -> None:
        self.batches.append(batch)

    def compare(self, net: torch.nn.Module) -> None:
        ids, documents, labels = (
            torch.cat([batch[name] for batch in self.batches]) for name in ("input_ids", "document_ids", "labels")
        )
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(net(ids, documents).flatten(0, 1), labels.flatten())
            expected = torch.autograd.grad(loss, list(net.parameters()))
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4)
        self.labels.append([int((batch["labels"] != IGNORE_INDEX).sum()) for batch in self.batches])
        self.batches = []


@pytest.mark.parametrize("policy", PACKING_POLICIES)
def test_gradient_is_that_of_the_mean_over_a_steps_labels(
    trainer: Build, task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText], policy: PackingPolicy
) -> None:
    """Padded rows have fewer labels, and the last step of an epoch has fewer micro-batches."""
    gradients = Gradients()
    run = trainer(
        max_steps=-1, max_epochs=1, limit_train_batches=7, accumulate_grad_batches=3, callbacks=[gradients],
        limit_val_batches=0,
    )  # fmt: skip
    run.fit(task(), packed_text(packing=policy, batch_size=2, document_mask=True))
    assert [len(step) for step in gradients.labels] == [3, 3, 1]
    if policy == "one_document":
        assert len({n for step in gradients.labels for n in step}) > 1


@pytest.mark.parametrize(
    ("settings", "callbacks", "micro_batches"),
    [
        ({"max_epochs": 2, "overfit_batches": 4, "accumulate_grad_batches": 2}, [], [2, 2, 2, 2]),
        ({"max_epochs": 2, "limit_train_batches": 2}, [GradientAccumulationScheduler({0: 1, 1: 2})], [1, 1, 2]),
    ],
    ids=["overfit_batches", "scheduled_accumulation"],
)
def test_gradient_is_a_mean_where_lightning_changes_the_batches(
    trainer: Build, task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText],
    settings: dict[str, int], callbacks: list[L.Callback], micro_batches: list[int],
) -> None:  # fmt: skip
    """A batch does not have the step's count if a scheduler changes the step."""
    gradients = Gradients()
    run = trainer(max_steps=-1, limit_val_batches=0, callbacks=[gradients, *callbacks], **settings)
    run.fit(task(), packed_text(batch_size=2, document_mask=True))
    assert [len(step) for step in gradients.labels] == micro_batches


def test_loss_learning_rate_and_gradient_norm_are_logged(
    trainer: Build, task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText], tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path)
    schedule = Schedule(warmup_steps=4, decay_share=0.5)
    model = task(optimizer=AdamW(lr=0.01), schedule=schedule)
    run = trainer(max_steps=20, log_every_n_steps=5, logger=logger, callbacks=[ValidateAtEnd()])
    run.fit(model, packed_text())
    scalars = read(logger.log_dir)
    assert [step for step, _ in scalars["train/loss"]] == [4, 9, 14, 19]
    for step, rate in scalars["train/learning_rate"]:
        assert rate == pytest.approx(0.01 * schedule.factor(step, 20))
    assert all(value > 0 for _, value in scalars["train/gradient_norm"])
    [(_, loss)], [(_, perplexity)] = scalars["val/loss"], scalars["val/perplexity"]
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_validation_metrics_match_a_computation_by_hand(
    trainer: Build, task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText]
) -> None:
    model, data = task(), packed_text(block_size=64)
    run = trainer(max_steps=30, callbacks=[ValidateAtEnd()])
    run.fit(model, data)
    ids = torch.tensor(data.store.validation.read(0, 10**9).astype("int64"))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 64):
            inputs, labels = ids[start : start + 64][: len(ids) - 1 - start], ids[start + 1 : start + 65]
            nats -= model.net(inputs[None])[0].log_softmax(-1).gather(1, labels[:, None]).sum().item()
    assert run.callback_metrics["val/loss"].item() == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    bits = nats / math.log(2) / data.store.validation.n_bytes
    assert run.callback_metrics["val/bits_per_byte"].item() == pytest.approx(bits, rel=1e-5)


def test_validation_of_one_document_matches_evaluate(
    trainer: Build, task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText], corpus: Path
) -> None:
    model, data = task(), packed_text(source=str(corpus / "00.txt"), validation_share=0.3)
    run = trainer(max_steps=5, callbacks=[ValidateAtEnd()])
    run.fit(model, data)
    text = (corpus / "00.txt").read_text(encoding="utf-8")
    figures = score_documents(model.net.eval(), data.tokenizer, [text[int(len(text) * 0.7) :]])
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert run.callback_metrics[f"val/{name}"].item() == pytest.approx(figures[name], rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bits_per_byte_is_by_the_bytes_of_the_text(
    trainer: Build,
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    tmp_path: Path,
    form: str,
) -> None:
    """The validation metric, ``evaluate`` and a computation by hand agree, also if the tokenizer loses text."""
    build_tokenizer(form).save(tmp_path / "tokenizer.json")
    text = "".join(f"{line} \u2581ÉCOLE 東京, n't\t" for line in sentences(1).splitlines())
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    held_out = text[int(len(text) * 0.5) :]
    data = packed_text(
        source=str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=None,
        validation_share=0.5, block_size=16, cache=str(tmp_path),
    )  # fmt: skip
    model, run = task(), trainer(max_steps=2, callbacks=[ValidateAtEnd()])
    run.fit(model, data)
    model.net.eval()
    ids = torch.tensor([data.tokenizer.end_of_text, *data.tokenizer.encode(held_out)])
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            labels = ids[start + 1 : start + 17]
            logits = model.net(ids[start : start + 16][: len(labels)][None])[0]
            nats -= logits.log_softmax(-1).gather(1, labels[:, None]).sum().item()
    expected = nats / math.log(2) / len(held_out.encode())
    assert run.callback_metrics["val/bits_per_byte"].item() == pytest.approx(expected, rel=1e-5)
    assert score_documents(model.net, data.tokenizer, [held_out])["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert sum(int(batch["text_bytes"].sum()) for batch in data.val_dataloader()) == len(held_out.encode())


@pytest.mark.parametrize(
    "flags",
    [
        {"max_steps": 7},
        {"max_steps": 7, "accumulate_grad_batches": 3},
        {"max_steps": 7, "val_check_interval": 5, "check_val_every_n_epoch": None},
        {"max_steps": 10, "val_check_interval": 5, "check_val_every_n_epoch": None},
        {"max_steps": -1, "max_epochs": 1, "val_check_interval": 5, "check_val_every_n_epoch": None},
        {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 7, "val_check_interval": 5},
        {"max_steps": -1, "max_epochs": 1},
    ],
)
def test_run_ends_with_exactly_one_validation(
    trainer: Build, task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText], flags: dict[str, int]
) -> None:
    validated: list[int] = []

    class Note(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            validated.append(trainer.global_step)

    run = trainer(**{"callbacks": [Note(), ValidateAtEnd()], **flags})
    run.fit(task(), packed_text())
    assert run.global_step > 0
    assert validated.count(run.global_step) == 1
    if flags["max_steps"] > 0:
        assert run.global_step == flags["max_steps"]


@pytest.mark.parametrize("tied", [True, False])
def test_loss_in_chunks_trains_the_same_model(
    trainer: Build, task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText], tied: bool
) -> None:
    """Logits of 1,024 positions and 300 tokens take 1.2 MB."""
    gpt = GPTConfig(n_layer=1, n_head=2, n_embd=32, tied_embeddings=tied)

    def run(max_logits_mb: int) -> tuple[dict[str, torch.Tensor], float]:
        L.seed_everything(0)
        model = task(gpt=gpt, optimizer=AdamW(lr=1e-3), max_logits_mb=max_logits_mb)
        run = trainer(max_steps=6, accumulate_grad_batches=2, callbacks=[ValidateAtEnd()])
        run.fit(model, packed_text(batch_size=32, block_size=32))
        assert model.loss_chunk_size == (512 if max_logits_mb == 1 else 32_768)
        return model.state_dict(), run.callback_metrics["val/loss"].item()

    (whole, whole_loss), (first, loss), (second, repeated) = run(64), run(1), run(1)
    assert loss == repeated == pytest.approx(whole_loss, rel=1e-6)
    for name, weight in first.items():
        assert torch.equal(weight, second[name])
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("layout", "expected"), [((2, 1), 512), ((1, 2), None), ((2, 2), None)])
def test_loss_is_computed_in_chunks_unless_tensor_parallelism_splits_the_head(
    task: Callable[..., LanguageModel], layout: tuple[int, int], expected: int | None
) -> None:
    model = task(max_logits_mb=1)
    model.net = GPT(TINY, 300, 8)
    with fake_mesh(*layout) as mesh:
        model._device_mesh = mesh
        assert model.loss_chunk_size == expected


def test_chunks_of_the_loss_must_not_be_empty() -> None:
    with pytest.raises(UserError, match=r"model\.max_logits_mb is 0; it must be positive"):
        LanguageModel(max_logits_mb=0)


def test_configure_model_builds_once(
    task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText], trainer: Build
) -> None:
    model = task()
    trainer(max_steps=1).fit(model, packed_text())
    net = model.net
    model.configure_model()
    assert model.net is net


def test_bare_loaders_are_rejected(task: Callable[..., LanguageModel], trainer: Build) -> None:
    with pytest.raises(UserError, match="requires a data module"):
        trainer().fit(task(), torch.utils.data.DataLoader([1]))


@pytest.mark.skipif(bool(explain_no_compile(torch.device("cpu"))), reason="torch.compile needs a compiler")
@pytest.mark.slow
@pytest.mark.parametrize("validate", [False, True])
def test_compiled_and_eager_agree_and_compiled_is_deterministic(
    trainer: Build, task: Callable[..., LanguageModel], packed_text: Callable[..., PackedText], validate: bool
) -> None:
    """Validation is compiled separately, which takes ten seconds; without it, the trained weights are compared."""

    def result(compile: bool) -> float:
        L.seed_everything(0)
        model = task(compile=compile, gpt=GPTConfig(n_layer=1, n_head=2, n_embd=32))
        run = trainer(max_steps=5, callbacks=[ValidateAtEnd()], limit_val_batches=1.0 if validate else 0)
        run.fit(model, packed_text())
        assert not any("_orig_mod" in name for name in model.state_dict())
        if validate:
            return run.callback_metrics["val/loss"].item()
        return sum(weight.double().abs().sum().item() for weight in model.state_dict().values())

    compiled = result(True)
    assert compiled == pytest.approx(result(False), rel=1e-4)
    assert compiled == result(True)
