"""Introspection metrics and plots, against values computed by hand."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.callbacks.default_callbacks import default_callbacks
from lit_gpt_scratch.callbacks.introspection import (
    MAX_INSPECTED_TOKENS,
    PARAMETER_PARTS,
    ActivationStats,
    GradientStats,
    LayerStats,
    activation_metrics,
    masked_mean,
    part_name,
    printable_token,
)
from lit_gpt_scratch.callbacks.loss_breakdown import (
    N_PASSAGES,
    PASSAGE_LENGTH,
    LossBreakdown,
    frequency_bands,
    position_bands,
)
from lit_gpt_scratch.callbacks.samples import Samples
from lit_gpt_scratch.callbacks.signal_handling import SignalHandling
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.activation_hooks import CapturedActivations, capture_activations
from lit_gpt_scratch.model.lora import LoRA
from lit_gpt_scratch.model.output_heads import ScalarHead
from lit_gpt_scratch.tasks import LanguageModel
from lit_gpt_scratch.text.markdown import markdown_code

Trainers, Tasks, Texts = Callable[..., L.Trainer], Callable[..., LanguageModel], Callable[..., PackedText]
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=32, initialisation="gpt2")
ONE = torch.ones(())


class Witness(L.Callback):
    """Keeps gradients as they are before clipping, and weights before and after each step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.measured: list[dict[str, Any]] = []

    def on_gradient(self, trainer: L.Trainer, task: LanguageModel) -> None:
        named = task.net.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in task.net.named_parameters()})

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.measured.append({name: float(value) for name, value in trainer.logged_metrics.items()})

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.on_train_batch_start(trainer, task)


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


CHANGES = {
    "all": {},
    "tied": {"gpt": GPTConfig(n_layer=2, n_head=2, n_embd=32, initialisation="gpt2", tied_embeddings=True)},
    "adapters": {"gpt": SHAPE, "lora": LoRA(2)},
    "uneven": {"gpt": SHAPE},
}


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_and_updates_by_part(trainer: Trainers, task: Tasks, packed_text: Texts, change: str) -> None:
    witness = Witness()
    run = trainer(
        callbacks=[GradientStats(1), witness], log_every_n_steps=1, limit_val_batches=0, gradient_clip_val=0.01,
        accumulate_grad_batches=2, max_steps=3,
    )  # fmt: skip
    model = task(**({"gpt": SHAPE} | CHANGES[change]))
    run.fit(model, packed_text(packing="one_document" if change == "uneven" else "concatenate"))
    for step in range(3):
        found = witness.measured[2 * step + 1]
        by_part: dict[str, list[str]] = {}
        for name in witness.gradients[step]:
            by_part.setdefault(part_name(name), []).append(name)
        assert {n.rpartition("/")[2] for n in found if "update_ratio" in n} == by_part.keys()
        for part, names in by_part.items():
            gradient = norm([witness.gradients[step][name] for name in names])
            assert found[f"dynamics/gradient_norm/{part}"] == pytest.approx(gradient, rel=1e-5)
            before, after = witness.weights[2 * step], witness.weights[2 * step + 2]
            if change != "adapters":  # some of theirs begin at zero
                ratio = norm([after[name] - before[name] for name in names]) / norm([before[name] for name in names])
                assert found[f"dynamics/update_ratio/{part}"] == pytest.approx(ratio, rel=1e-4)
        # The parts are the whole, and it is not the clipped one.
        whole = math.sqrt(sum(found[f"dynamics/gradient_norm/{part}"] ** 2 for part in by_part))
        assert whole == pytest.approx(found["train/gradient_norm"], rel=1e-5)
        assert whole > 0.01
        for layer in (1, 2):
            names = [name for name in witness.gradients[step] if name.startswith(f"blocks.{layer - 1}.")]
            expected = norm([witness.gradients[step][name] for name in names])
            assert found[f"dynamics/gradient_norm/layer_{layer}"] == pytest.approx(expected, rel=1e-5)


def test_every_parameter_belongs_to_a_part() -> None:
    shape = GPTConfig(
        n_layer=1, n_head=2, n_embd=32, value_embeddings=True, bigram_rows=9, smear=True, residual_scalars=True,
        position="learned", norm_placement="sandwich", bias=True, norm="layernorm",
    )  # fmt: skip
    parts = {name: part_name(name) for name, _ in GPT(shape, 50, 16).named_parameters()}
    assert set(parts.values()) == set(PARAMETER_PARTS)
    assert parts["blocks.0.attention.query_norm.weight"] == "attention"
    assert {name for name, part in parts.items() if part == "head"} == {"head.weight"}
    assert {name.split(".")[0] for name, part in parts.items() if part == "embedding"} == {
        "embedding", "bigrams", "smear", "position", "value_tables"
    }  # fmt: skip


def test_weights_that_are_zero_have_no_update_ratio(trainer: Trainers, task: Tasks, packed_text: Texts) -> None:
    witness = Witness()  # in this shape the head begins at zero
    trainer(callbacks=[GradientStats(1), witness], limit_val_batches=0, max_steps=2).fit(task(), packed_text())
    assert "dynamics/update_ratio/head" not in witness.measured[0]
    assert 0 < witness.measured[1]["dynamics/update_ratio/head"] < 10


def test_measurements_come_at_the_first_step_and_every_n_steps(
    trainer: Trainers, task: Tasks, packed_text: Texts, tmp_path: Path
) -> None:
    logger = TensorBoardLogger(tmp_path, "x", "y")
    run = trainer(
        callbacks=[GradientStats(3), ActivationStats(3, False)], logger=logger, max_steps=7, val_check_interval=5
    )
    run.fit(task(), packed_text())
    events = EventAccumulator(logger.log_dir).Reload()
    for name in ("dynamics/gradient_norm/attention", "dynamics/dead_units", "attention/sink/most"):
        assert [point.step for point in events.Scalars(name)] == [0, 2, 5]
    assert not events.Tags()["images"]
    assert not events.Tags()["histograms"]


def test_planted_dead_units_and_the_logit_norm(trainer: Trainers, task: Tasks, packed_text: Texts) -> None:
    class Killer(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, model: L.LightningModule, *_: Any) -> None:
            with torch.no_grad():
                part = model.net.blocks[1].feed_forward.input
                part.weight[:5], part.bias[:5] = 0.0, -1.0

    witness = Witness()
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=32, feed_forward="relu", bias=True, initialisation="gpt2", ffn_dim=20)
    model, data = task(gpt=shape), packed_text()
    trainer(callbacks=[Killer(), ActivationStats(1), witness], max_steps=1, limit_val_batches=0).fit(model, data)
    found = witness.measured[0]
    assert found["dynamics/dead_units/layer_1"] == 0
    assert found["dynamics/dead_units/layer_2"] == pytest.approx(5 / 20)
    assert found["dynamics/dead_units"] == pytest.approx(5 / 40)
    ids = data.validation_dataset.make_batch(range(min(MAX_INSPECTED_TOKENS // 32, len(data.validation_dataset))))[
        "input_ids"
    ]
    with torch.no_grad():
        assert found["dynamics/logit_norm"] == pytest.approx(float(model.net(ids).norm(dim=-1).mean()), rel=1e-5)
        layers = capture_activations(model.net, ids, None, lambda seen: (seen.stream, seen.weights)).layers
    for number, (stream, weights) in enumerate(layers, 1):
        assert found[f"dynamics/stream_norm/layer_{number}"] == pytest.approx(float(stream.square().mean().sqrt()))
        assert weights is not None
        assert found[f"attention/sink/layer_{number}"] == pytest.approx(float(weights[:, :, 1:, 0].mean()), rel=1e-5)


@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.9}], ids=["plain", "average"])
def test_training_is_bitwise_the_same_with_introspection(
    trainer: Trainers, task: Tasks, packed_text: Texts, tmp_path: Path, more: dict[str, Any]
) -> None:
    """With all measurements and plots at every step, and with none."""
    weights, losses = [], []
    shape = GPTConfig(n_layer=2, n_head=2, n_embd=32, dropout=0.2)
    for watching in (False, True):
        watch = [GradientStats(1), ActivationStats(1), LossBreakdown(True), Samples(tokens=5)] if watching else []
        logger = TensorBoardLogger(tmp_path, "x", "y") if watching else False
        L.seed_everything(3)
        model = task(gpt=shape, **more)
        run = trainer(callbacks=watch, logger=logger, max_steps=6, val_check_interval=3, gradient_clip_val=1.0)
        run.fit(model, packed_text(seed=3))
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        losses.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert losses[0] == losses[1]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("block_size", [32, 96])
def test_losses_by_position_and_frequency_are_parts_of_the_validation_loss(
    trainer: Trainers, task: Tasks, packed_text: Texts, tmp_path: Path, block_size: int
) -> None:
    logger = TensorBoardLogger(tmp_path, "x", "y")
    data = packed_text(block_size=block_size, batch_size=2)
    model = task()
    run = trainer(callbacks=[LossBreakdown(True)], logger=logger, max_steps=6, val_check_interval=6)
    run.fit(model, data)
    batch = data.validation_dataset.make_batch(range(len(data.validation_dataset)))
    labels, counted = batch["labels"], batch["labels"] != IGNORE_INDEX
    with torch.no_grad():
        chances = model.net(batch["input_ids"]).log_softmax(-1)
    losses = torch.where(counted, -chances.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1), 0.0)
    found = {name: float(value) for name, value in run.logged_metrics.items()}

    whole = 0.0
    for begin, end in position_bands(block_size):
        here = counted[:, begin : end + 1].sum()
        mean = losses[:, begin : end + 1].sum() / here
        assert found[f"loss_by_position/{begin}-{end}"] == pytest.approx(float(mean), rel=1e-5)
        whole += found[f"loss_by_position/{begin}-{end}"] * int(here) / int(counted.sum())
    assert whole == pytest.approx(found["val/loss"], rel=1e-5)

    train = torch.cat([data.train_dataset[n]["labels"].flatten() for n in range(len(data.train_dataset))]).tolist()
    ranked = sorted(range(data.vocab_size), key=lambda id_: (-train.count(id_), id_))
    for name, tokens in (("1-10", ranked[:10]), ("11-100", ranked[10:100])):
        of_band = torch.isin(labels, torch.tensor(tokens))
        assert found[f"loss_by_frequency/{name}"] == pytest.approx(float(losses[of_band].mean()), rel=1e-5)

    text = EventAccumulator(logger.log_dir).Reload().Tensors("views/hardest_passages/text_summary")[-1]
    told = [float(number) for number in re.findall(r"\*\*([\d.]+) nats", text.tensor_proto.string_val[0].decode())]
    n = block_size // PASSAGE_LENGTH * PASSAGE_LENGTH
    spans, full = (x[:, :n].reshape(-1, PASSAGE_LENGTH) for x in (losses, counted))
    expected = spans[full.all(-1)].mean(-1).sort(descending=True).values[:N_PASSAGES].tolist()
    assert told == pytest.approx(expected, abs=0.006)


def test_without_pictures_there_are_the_same_curves(
    trainer: Trainers, task: Tasks, packed_text: Texts, tmp_path: Path
) -> None:
    tags = []
    for pictures in (True, False):
        inspection = ActivationStats(2, pictures, prompts=[])
        watch = [each for each in default_callbacks([], inspection, SignalHandling(None), None, False, "off")
                 if isinstance(each, GradientStats | ActivationStats | LossBreakdown)]  # fmt: skip
        logger = TensorBoardLogger(tmp_path, "x", str(pictures))
        trainer(callbacks=watch, logger=logger, max_steps=2, val_check_interval=2).fit(task(), packed_text())
        tags.append(EventAccumulator(logger.log_dir).Reload().Tags())
    assert tags[0]["scalars"] == tags[1]["scalars"]
    assert any(name.startswith("loss_by_frequency/") for name in tags[1]["scalars"])
    assert tags[0]["images"]
    assert not any(tags[1][kind] for kind in ("images", "tensors", "histograms"))


def test_means_exclude_padding() -> None:
    torch.manual_seed(0)
    values, lengths = torch.randn(3, 7, 4), torch.tensor([7, 2, 0])
    expected = torch.cat([values[0], values[1, :2]]).mean()
    assert masked_mean(values, lengths) == pytest.approx(float(expected))
    layer = LayerStats(None, ONE[None], masked_mean(values.square(), lengths).sqrt())
    norms = [values[row, place].norm() for row in range(3) for place in range(int(lengths[row]))]
    found = activation_metrics(CapturedActivations(values, [layer], values), lengths)
    assert found["dynamics/logit_norm"] == pytest.approx(float(sum(norms)) / 9)


def test_bands_cover_every_position_and_every_token(packed_text: Texts) -> None:
    for size in (1, 2, 5, 64, 100):
        places = [place for begin, end in position_bands(size) for place in range(begin, end + 1)]
        assert places == list(range(size))
    data = packed_text()
    data.setup("fit")
    bands, names = frequency_bands(data)
    assert np.bincount(bands.numpy()).tolist()[:2] == [10, 90]
    assert len(bands) == data.vocab_size
    assert len(names) == int(bands.max()) + 1


def test_plots_and_texts_are_logged_and_the_projector_has_the_embedding(
    trainer: Trainers, task: Tasks, packed_text: Texts, tmp_path: Path
) -> None:
    logger, data, model = TensorBoardLogger(tmp_path, "x", "y"), packed_text(), task()
    watch = [ActivationStats(4), LossBreakdown(True), Samples(["the cat", "a dog"], tokens=5, greedy_tokens=3)]
    trainer(callbacks=watch, logger=logger, max_steps=4, val_check_interval=2).fit(model, data)
    events = EventAccumulator(logger.log_dir).Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {
        "views/attention_entropy", "views/attention_distance", "views/attention_sink", "views/attention/layer_1",
        "views/attention/layer_2", "views/loss_by_position",
    }  # fmt: skip
    assert {f"weights/{part}" for part in PARAMETER_PARTS} < set(tags["histograms"])
    assert {f"activations/{name}/layer_2" for name in ("stream", "feed_forward")} < set(tags["histograms"])
    for name in tags["images"]:
        assert [image.step for image in events.Images(name)] == [1, 3]
    [*_, histogram] = events.Histograms("weights/head")
    assert histogram.histogram_value.num == sum(histogram.histogram_value.bucket) == model.net.head.weight.numel()
    sample = events.Tensors("sample/2/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert sample.count("```\na dog") == 2

    [tensors] = Path(logger.log_dir, "projector").rglob("tensors.tsv")
    assert np.loadtxt(tensors) == pytest.approx(model.net.embedding.weight.detach().numpy(), rel=1e-5)
    assert len((tensors.parent / "metadata.tsv").read_text().splitlines()) == data.vocab_size
    assert str(tensors.relative_to(logger.log_dir)) in Path(logger.log_dir, "projector_config.pbtxt").read_text()


def test_the_logit_lens_ends_with_the_models_prediction_and_marks_the_true_token(
    trainer: Trainers, task: Tasks, packed_text: Texts, tmp_path: Path
) -> None:
    logger, data, model = TensorBoardLogger(tmp_path, "x", "y"), packed_text(), task(gpt=SHAPE)
    trainer(callbacks=[ActivationStats(4)], logger=logger, max_steps=4, val_check_interval=4).fit(model, data)
    [table] = EventAccumulator(logger.log_dir).Reload().Tensors("views/logit_lens/text_summary")
    rows = [line.split("|")[1:-1] for line in table.tensor_proto.string_val[0].decode().splitlines() if "|" in line]
    assert [row[0].strip() for row in rows[2:]] == ["true next token", "the embedding", "layer 1", "layer 2"]
    with torch.no_grad():
        logits = model.net(data.validation_dataset[0]["input_ids"])[0, 16:24]
    chances = [f"{chance:.0%}" for chance in logits.softmax(-1).amax(-1).tolist()]
    assert [cell.split()[-1] for cell in rows[-1][1:]] == chances
    targets = data.validation_dataset[0]["labels"][0, 16:24]
    assert [cell.strip() for cell in rows[2][1:]] == [
        markdown_code(printable_token(data.tokenizer, id_)) for id_ in targets.tolist()
    ]
    assert ["✓" in cell for cell in rows[-1][1:]] == (logits.argmax(-1) == targets).tolist()
    assert any("✓" in cell for cell in rows[-1])


def test_a_scalar_head_has_no_logit_norm() -> None:
    net = GPT(SHAPE, 50, 16, ScalarHead())
    seen = capture_activations(
        net, torch.zeros(2, 9, dtype=torch.int64), None, lambda layer: LayerStats(None, torch.ones(3), ONE)
    )
    assert activation_metrics(seen).keys() == {
        "dynamics/dead_units", "dynamics/dead_units/layer_1", "dynamics/dead_units/layer_2",
        "dynamics/stream_norm/layer_1", "dynamics/stream_norm/layer_2",
    }  # fmt: skip


def test_a_negative_interval_is_rejected() -> None:
    with pytest.raises(UserError, match=r"inspect\.every_n_steps is -1"):
        ActivationStats(-1)


def test_a_diverged_model_is_plotted(trainer: Trainers, task: Tasks, packed_text: Texts, tmp_path: Path) -> None:
    class Poison(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, model: L.LightningModule, *_: Any) -> None:
            with torch.no_grad():
                model.net.blocks[0].attention.query.weight.fill_(math.nan)

    logger = TensorBoardLogger(tmp_path, "x", "y")
    watch = [Poison(), GradientStats(1), ActivationStats(1), LossBreakdown(True), Samples()]
    trainer(callbacks=watch, logger=logger, max_steps=2, val_check_interval=2).fit(task(), packed_text())
    [*_, last] = EventAccumulator(logger.log_dir).Reload().Scalars("attention/entropy")
    assert math.isnan(last.value)
    assert json.dumps(last.step) == "1"
