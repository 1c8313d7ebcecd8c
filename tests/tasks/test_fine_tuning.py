"""Fine-tuning: initial models, frozen layers, adapters and their files, and classification."""

import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.checkpoint.adapters import apply_adapter, save_adapter
from lit_gpt_scratch.checkpoint.checkpoint_io import save_checkpoint
from lit_gpt_scratch.checkpoint.init_from import InitialModel, copy_weights, has_same_head
from lit_gpt_scratch.checkpoint.loading import build_model, load_checkpoint, load_model
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from lit_gpt_scratch.checkpoint.safetensors_export import export_safetensors, load_safetensors
from lit_gpt_scratch.cli import convert
from lit_gpt_scratch.data import Conversations, LabelledText, PackedText
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.metrics import mean_auroc
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.lora import LoRA, add_lora, lora_state_dict
from lit_gpt_scratch.model.output_heads import POOLINGS, ClassificationHead
from lit_gpt_scratch.model.presets import PRESETS
from lit_gpt_scratch.optim import Schedule
from lit_gpt_scratch.tasks import Classification, LanguageModel

Build = Callable[..., L.Trainer]
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path) -> Path:
    """The checkpoint of a model pretrained on a corpus."""
    folder = tmp_path_factory.mktemp("base")
    data = PackedText(str(corpus), vocab_size=300, block_size=144, batch_size=4, cache=str(cache), validation_share=0.1)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=30, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        default_root_dir=folder, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(LanguageModel(SHAPE, compile=False), data)
    trainer.save_checkpoint(folder / "base.ckpt")
    return folder / "base.ckpt"


@pytest.fixture
def tuned(trainer: Build, base: Path, tmp_path: Path, cache: Path) -> Callable[..., tuple[Any, Path]]:
    """Fine-tune the base on generated records; returns the module and its checkpoint."""

    def build_and_fit(task: Any, data: type = Conversations, steps: int = 4, **more: Any) -> tuple[Any, Path]:
        records = data(init_from=str(base), cache=str(cache), block_size=128, batch_size=2, **more)
        made = trainer(max_steps=steps, limit_val_batches=1)
        made.fit(task, records)
        path = tmp_path / "tuned.ckpt"
        made.save_checkpoint(path)
        return task, path

    return build_and_fit


class FirstOutput(L.Callback):
    """Records the logits of the first training batch, before any update."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0:
            with torch.no_grad():
                self.batch, self.logits = batch, pl_module.net(batch["input_ids"], batch["document_ids"])


@pytest.mark.parametrize("how", [{}, {"lora": LoRA(4)}, {"train_layers": 1}], ids=["all", "adapters", "last layer"])
def test_first_output_equals_the_initial_models_bit_for_bit(
    trainer: Build, base: Path, cache: Path, how: dict[str, Any]
) -> None:
    first = FirstOutput()
    task = LanguageModel(init_from=str(base), compile=False, **how)
    data = Conversations(init_from=str(base), cache=str(cache), block_size=128, batch_size=2)
    trainer(max_steps=2, limit_val_batches=0, callbacks=[first]).fit(task, data)
    start, _ = load_model(base)
    assert torch.equal(first.logits, start(first.batch["input_ids"], first.batch["document_ids"]))
    assert task.gpt == SHAPE
    assert task.net.block_size == 144  # the initial model's, although the data's windows are shorter


@pytest.mark.parametrize(
    ("how", "trained"),
    [
        ({"lora": LoRA(4)}, r".*\.lora_[ab]"),
        ({"train_layers": 1}, r"blocks\.1\..*|norm\..*|head\..*"),
        ({"train_layers": 0}, r"norm\..*|head\..*"),
        ({"lora": LoRA(2, pattern="query|value")}, r"blocks\.\d\.attention\.(query|value)\.lora_[ab]"),
    ],
)
def test_only_unfrozen_weights_change(
    tuned: Callable[..., tuple[Any, Path]], base: Path, how: dict[str, Any], trained: str
) -> None:
    task, _ = tuned(LanguageModel(init_from=str(base), compile=False, **how))
    start = load_model(base)[0].state_dict()
    for name, parameter in task.net.named_parameters():
        asked = re.fullmatch(trained, name) is not None
        assert parameter.requires_grad == asked, name
        assert (parameter.grad is not None) <= asked
        if name in start:
            assert torch.equal(parameter, start[name]) != asked, name


def test_adapter_file_holds_adapters_only_and_merges_into_its_base_only(
    tuned: Callable[..., tuple[Any, Path]], base: Path, tmp_path: Path
) -> None:
    task, path = tuned(LanguageModel(init_from=str(base), lora=LoRA(4), compile=False), steps=8)
    file = tmp_path / "adapter.safetensors"
    save_adapter(path, file)
    trained = build_model(load_checkpoint(base), base)
    merged = apply_adapter(trained, file)
    ids = torch.randint(0, 300, (2, 20))
    assert not torch.equal(merged.net(ids), trained.net(ids))
    torch.testing.assert_close(merged.net(ids), task.net.eval()(ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(load_model(path)[0](ids), merged.net(ids), rtol=0, atol=0)
    with pytest.raises(UserError, match="weights of a different base model"):
        apply_adapter(merged, file)
    with pytest.raises(UserError, match="contains only adapters; pass the base model"):
        load_model(file)
    with pytest.raises(UserError, match="has no adapters"):
        save_adapter(base, file)


def test_safetensors_export_merges_adapters(tuned: Callable[..., tuple[Any, Path]], base: Path, tmp_path: Path) -> None:
    task, path = tuned(Classification(init_from=str(base), lora=LoRA(2), compile=False), LabelledText, steps=8)
    file = tmp_path / "model.safetensors"
    convert.main(["to-safetensors", str(path), str(file)])
    assert load_file(file).keys() == GPT(task.gpt, task.net.vocab_size, 144, task.output_head).state_dict().keys()
    own, shared = build_model(load_checkpoint(path), path), build_model(load_checkpoint(file), file)
    for name, weight in own.net.state_dict().items():
        assert torch.equal(weight, shared.net.state_dict()[name]), name
    assert shared.metadata == replace(own.metadata, lora=None, base=None, new_head=False)


def test_rank_eight_adapter_is_a_fiftieth_of_gpt2(tmp_path: Path) -> None:
    """Bytes of the file, compared with the base's weights in float32; it contains only adapters."""
    with torch.device("meta"):
        net = GPT(PRESETS["gpt2_124m"], 50257, 1024)
    whole = 4 * sum(parameter.numel() for parameter in net.parameters())
    add_lora(net, LoRA(8))
    shapes = {name: weight.shape for name, weight in net.state_dict().items()}
    lora = lora_state_dict(net).keys()
    # Keep one number of each base weight; otherwise the test would write half a gigabyte.
    state = {f"net.{name}": torch.zeros(shape if name in lora else 1) for name, shape in shapes.items()}
    contents = CheckpointMetadata(
        asdict(PRESETS["gpt2_124m"]), 50257, 1024, "{}", lora=asdict(LoRA(8)), base="its hash"
    )
    save_checkpoint({METADATA_KEY: asdict(contents), "state_dict": state}, tmp_path / "run.ckpt")
    file = tmp_path / "adapter.safetensors"
    save_adapter(tmp_path / "run.ckpt", file)
    assert load_file(file).keys() == lora
    assert 0.005 * whole < file.stat().st_size <= 0.02 * whole


def test_adapter_without_a_head_requires_its_bases_head(
    tuned: Callable[..., tuple[Any, Path]], base: Path, tmp_path: Path
) -> None:
    """Bases that differ only in the head are different, unless the adapter has its own head."""
    for task, data, relies in ((LanguageModel, Conversations, True), (Classification, LabelledText, False)):
        _, path = tuned(task(init_from=str(base), lora=LoRA(2), compile=False), data, steps=1)
        file = tmp_path / "adapter.safetensors"
        save_adapter(path, file)
        other = build_model(load_checkpoint(base), base)
        apply_adapter(other, file)
        with torch.no_grad():
            other.net.head.weight += 1
        if relies:
            with pytest.raises(UserError, match="weights of a different base model"):
                apply_adapter(other, file)
        else:
            apply_adapter(other, file)


@pytest.mark.parametrize("left_out", [".lora_a", "head.weight"])
def test_incomplete_adapter_is_rejected(
    tuned: Callable[..., tuple[Any, Path]], base: Path, tmp_path: Path, left_out: str
) -> None:
    _, path = tuned(Classification(init_from=str(base), lora=LoRA(2), compile=False), LabelledText, steps=1)
    file = tmp_path / "adapter.safetensors"
    save_adapter(path, file)
    part = load_safetensors(file, "")
    missing = next(name for name in part["state_dict"] if name.endswith(left_out))
    part["state_dict"] = {name: weight for name, weight in part["state_dict"].items() if name != missing}
    export_safetensors(part, "", file)
    with pytest.raises(UserError, match=f"has missing or unexpected weights: {re.escape(missing)}"):
        apply_adapter(build_model(load_checkpoint(base), base), file)


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ({"gpt": replace(SHAPE, n_layer=3)}, {}, "n_layer is 2 in the checkpoint, but 3 in this run"),
        ({}, {"init_from": None, "vocab_size": 280}, "a different tokenizer"),
        ({"init_from": "nowhere.ckpt"}, {}, "no checkpoint at nowhere.ckpt"),
        ({"lora": LoRA(4), "train_layers": 1}, {}, "set only one of them"),
    ],
)
def test_settings_that_contradict_the_initial_model_are_rejected(
    trainer: Build, base: Path, cache: Path, task: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    records = {"init_from": str(base), "cache": str(cache), "block_size": 128, "batch_size": 2}
    with pytest.raises(UserError, match=message):
        trainer().fit(
            LanguageModel(**({"init_from": str(base), "compile": False} | task)), Conversations(**(records | data))
        )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_class_logits_do_not_depend_on_padding(pooling: str) -> None:
    """Each text by itself, compared with all in one batch."""
    x, lengths = torch.randn(3, 7, 5), torch.tensor([7, 1, 4])
    expected = [
        row[n - 1] if pooling == "last" else row[:n].mean(0) for row, n in zip(x, lengths.tolist(), strict=True)
    ]
    torch.testing.assert_close(POOLINGS[pooling](x, lengths).squeeze(1), torch.stack(expected))


@pytest.mark.parametrize(
    "weights",
    [pytest.param(None, marks=pytest.mark.slow), "balanced", pytest.param({"cats": 3.0}, marks=pytest.mark.slow)],
)
def test_classification_learns_and_its_metrics_match_a_computation_by_hand(
    tuned: Callable[..., tuple[Any, Path]], base: Path, weights: Any
) -> None:
    """Loss and metrics, recomputed from the test batches."""
    L.seed_everything(0)
    names = LabelledText(init_from=str(base)).class_names
    weights = {names[0]: 3.0} if isinstance(weights, dict) else weights
    task, path = tuned(
        Classification(init_from=str(base), class_weights=weights, compile=False), LabelledText, steps=300
    )
    data: Any = task.trainer.datamodule
    logits, labels = [], []
    with torch.no_grad():
        for batch in data.test_dataloader():
            logits.append(task(batch["input_ids"], batch["lengths"]))
            labels.append(batch["labels"])
    counted = torch.cat(labels) != IGNORE_INDEX
    found, true = torch.cat(logits)[counted], torch.cat(labels)[counted]
    task.trainer.test(task, data, verbose=False)
    measured = task.trainer.callback_metrics
    assert measured["test/accuracy"].item() == pytest.approx((found.argmax(-1) == true).float().mean().item())
    assert measured["test/accuracy"] > 0.7  # of three classes
    each: Tensor = F.cross_entropy(found, true, reduction="none")
    weight = task.weights[true]
    if weights == "balanced":
        together = task.weights * torch.tensor(data.class_counts)
        torch.testing.assert_close(together, together.mean().expand_as(together))
    assert measured["test/loss"].item() == pytest.approx(((each * weight).sum() / weight.sum()).item(), rel=1e-5)
    for row in range(len(names)):
        for column in range(len(names)):
            assert task.confusion[row, column] == ((true == row) & (found.argmax(-1) == column)).sum()
    f1, auroc = [], []
    for name in range(len(names)):
        given, is_ = found.argmax(-1) == name, true == name
        f1.append(2 * (given & is_).sum().item() / (given.sum() + is_.sum()).item())
        chance = found.softmax(-1)[:, name]
        above = chance[is_][:, None] - chance[~is_]  # whether a text of the class has a higher probability than another
        auroc.append(((above > 0).float() + (above == 0) / 2).mean().item())
    assert measured["test/f1"].item() == pytest.approx(sum(f1) / len(names))
    assert measured["test/auroc"].item() == pytest.approx(sum(auroc) / len(names), abs=1e-5)
    contents = build_model(load_checkpoint(path), path).metadata
    assert (contents.classes, contents.pooling) == (names, "mean")
    with pytest.raises(UserError, match="is not a language model"):
        load_model(path)


def test_auroc_ignores_classes_without_positives_or_negatives() -> None:
    each = torch.tensor([0.0, 0.25, 0.75])
    assert mean_auroc(each, torch.tensor([7, 0, 0])).isnan()
    assert mean_auroc(each, torch.tensor([0, 1, 3])) == 0.5
    assert mean_auroc(each, torch.tensor([2, 0, 1])) == 0.375


@pytest.mark.parametrize("how", [{}, {"lora": LoRA(2)}], ids=["all", "adapters"])
def test_head_for_different_classes_is_initialised_from_scratch(
    trainer: Build, base: Path, cache: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    """Even if the number of classes is the same."""

    def fit(start: Path, *classes: str) -> tuple[Classification, Path]:
        table = tmp_path / "rows.tsv"
        table.write_text("text\tlabel\n" + "".join(f"text {n}\t{classes[n % 2]}\n" for n in range(40)))
        data = LabelledText(source=str(table), init_from=str(start), cache=str(cache), block_size=128, batch_size=4)
        task = Classification(init_from=str(start), compile=False, **how)
        made = trainer(max_steps=2, limit_val_batches=0)
        made.fit(task, data)
        made.save_checkpoint(path := tmp_path / f"{classes[0]}.ckpt")
        return task, path

    _, path = fit(base, "ham", "spam")
    trained = InitialModel.read(str(path)).open_weights()
    sizes = trained.metadata.vocab_size, trained.metadata.block_size
    for classes, kept in ((("spam", "ham"), True), (("bad", "good"), False)):
        net = GPT(trained.config, *sizes, ClassificationHead(2, tuple(sorted(classes))))
        assert has_same_head(trained, net) is kept
        copy_weights(trained, net)
        assert torch.equal(net.head.weight, trained.weights["head.weight"]) is kept
        assert torch.equal(net.embedding.weight, trained.weights["embedding.weight"])
    assert fit(path, "bad", "good")[0].net.head.weight.requires_grad


def test_gradient_is_invariant_to_scaling_the_class_weights(trainer: Build, base: Path, cache: Path) -> None:
    """It is the gradient of the weighted mean, which is logged."""

    class Norms(L.Callback):
        def __init__(self) -> None:
            self.found: list[float] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self.found.append(sum(p.grad.double().norm().item() for p in pl_module.parameters() if p.grad is not None))

    found = []
    for scale in (1.0, 100.0):
        L.seed_everything(0)
        norms = Norms()
        data = LabelledText(init_from=str(base), cache=str(cache), batch_size=4)
        weights = {name: scale * (1 + place) for place, name in enumerate(data.class_names)}
        task = Classification(init_from=str(base), class_weights=weights, compile=False)
        trainer(max_steps=1, limit_val_batches=0, callbacks=[norms]).fit(task, data)
        found.append(norms.found)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_new_head_is_trained_and_saved_with_the_adapters(
    tuned: Callable[..., tuple[Any, Path]], base: Path, tmp_path: Path
) -> None:
    task, path = tuned(Classification(init_from=str(base), lora=LoRA(2), compile=False), LabelledText, steps=20)
    assert task.net.head.weight.requires_grad
    file = tmp_path / "adapter.safetensors"
    save_adapter(path, file)
    merged = apply_adapter(build_model(load_checkpoint(base), base), file)
    batch = next(iter(task.trainer.datamodule.test_dataloader()))
    with torch.no_grad():
        expected = task.eval()(batch["input_ids"], batch["lengths"])
        stream = POOLINGS["mean"](merged.net.hidden_states(batch["input_ids"]), batch["lengths"])
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(merged.net.apply_head(stream).squeeze(1), expected, rtol=0, atol=1e-4)
    assert merged.metadata.classes == task.trainer.datamodule.class_names


def test_new_head_stays_trainable_after_resuming(
    trainer: Build, tuned: Callable[..., tuple[Any, Path]], base: Path, cache: Path, tmp_path: Path
) -> None:
    """As ``fit`` resumes a run: from its own checkpoint, not the initial model."""

    def task(start: Path) -> Classification:
        L.seed_everything(0)
        steady = Schedule(decay="constant")
        return Classification(init_from=str(start), lora=LoRA(2), schedule=steady, compile=False)

    whole, _ = tuned(task(base), LabelledText, steps=8)
    _, path = tuned(task(base), LabelledText, steps=4)
    halves = task(path)
    data = LabelledText(init_from=str(path), cache=str(cache), block_size=128, batch_size=2)
    trainer(max_steps=8, limit_val_batches=1).fit(halves, data, ckpt_path=str(path))
    for name, weight in whole.net.state_dict().items():
        assert torch.equal(weight, halves.net.state_dict()[name]), name
    assert halves.checkpoint_metadata().base == whole.checkpoint_metadata().base
    assert halves.checkpoint_metadata().new_head
    assert (whole.head_is_new, halves.head_is_new) == (True, False)


@pytest.mark.parametrize("how", [{}, {"lora": LoRA(2)}, {"train_layers": 1}], ids=["all", "adapters", "last layer"])
def test_partial_training_of_random_weights_warns(
    trainer: Build, packed_text: Any, how: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    trainer(max_steps=1, limit_val_batches=0).fit(LanguageModel(SHAPE, compile=False, **how), packed_text())
    assert ("frozen weights stay random; set it to a pretrained model" in caplog.text) == bool(how)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embedding_is_not_part_of_the_head(trainer: Build, packed_text: Any, tmp_path: Path, tied: bool) -> None:
    """It is neither trained with the head, nor changed by an adapter, nor read from one."""
    shape, data = replace(SHAPE, tied_embeddings=tied), packed_text()
    made = trainer(max_steps=1, limit_val_batches=0)
    made.fit(LanguageModel(shape, compile=False), data)
    made.save_checkpoint(tmp_path / "start.ckpt")
    start = str(tmp_path / "start.ckpt")

    def task(**how: Any) -> LanguageModel:
        model = LanguageModel(init_from=start, compile=False, **how)
        trainer(max_steps=1, limit_val_batches=0).fit(model, data)
        return model

    assert task(train_layers=0).net.embedding.weight.requires_grad is False
    with pytest.raises(UserError, match="tied_embeddings"):
        task(gpt=replace(SHAPE, tied_embeddings=not tied))
    if tied:
        with pytest.raises(UserError, match="matches the head, but the head is tied to the embedding"):
            task(lora=LoRA(2, pattern="."))


def test_sample_prompts_leave_room_for_a_reply(base: Path, cache: Path) -> None:
    data = Conversations(init_from=str(base), cache=str(cache), block_size=40, too_long="drop", batch_size=1)
    assert all(len(prompt) < 40 for prompt in data.prompts)
    assert len(data.prompts) == 3
    assert Conversations(init_from=str(base), cache=str(cache), block_size=8, too_long="drop").prompts == []


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"class_weights": {"animals": 0.0}}, "class animals does not exist; choose from"),
        ({"pooling": "first"}, "model.pooling is first"),
        ({"class_weights": {"no such": 1.0}}, "class no such does not exist"),
        ({"class_weights": {"x": -1.0}}, "must be finite and 0 or more"),
    ],
)
def test_invalid_classification_settings_are_rejected(
    tuned: Callable[..., tuple[Any, Path]], base: Path, task: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tuned(Classification(init_from=str(base), compile=False, **task), LabelledText)


def test_data_without_classes_is_rejected(tuned: Callable[..., tuple[Any, Path]], base: Path) -> None:
    with pytest.raises(UserError, match="has no classes"):
        tuned(Classification(init_from=str(base), compile=False), Conversations)
