"""Baselines are measured on the text on which the model is validated."""

import json
from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from lit_gpt_scratch.callbacks.summary import BaselineMetrics, RunMetadata
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.data import LabelledText, PackedText
from lit_gpt_scratch.data.record_split import RecordSplit
from lit_gpt_scratch.evaluation.text_classifiers import LabelledTexts, word_baseline
from lit_gpt_scratch.tasks import Classification, LanguageModel
from lit_gpt_scratch.text import hub
from lit_gpt_scratch.text.document import TableRow
from tests.conftest import TINY, sentences


class Uniform(L.Callback):
    """Validate a model whose logits are all zero, which predicts as the uniform baseline does."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.zero_()


@pytest.mark.parametrize(
    "limits",
    [{}, {"limit_val_batches": 1}, {"limit_val_batches": 3}, {"limit_val_batches": 0.4}, {"overfit_batches": 2}],
)
@pytest.mark.parametrize("document_mask", [False, True])
def test_baselines_are_of_the_validated_text(
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    limits: dict[str, float],
    document_mask: bool,
) -> None:
    baselines = BaselineMetrics()
    runner = trainer(max_steps=1, callbacks=[Uniform(), baselines], check_val_every_n_epoch=None, val_check_interval=1,
                     **limits)  # fmt: skip
    runner.fit(task(), packed_text(validation_share=0.2, document_mask=document_mask))
    measured = runner.callback_metrics["val/bits_per_byte"].item()
    assert measured == pytest.approx(baselines.figures["uniform"], rel=1e-5 if limits else 1e-2)
    whole = packed_text(validation_share=0.2).validation_text()[1]
    ids, n_bytes = runner.datamodule.validation_text(8)  # type: ignore[attr-defined]  # the trainer sets it late
    assert n_bytes < whole
    assert len(ids) == 8 * 32 + 1


@pytest.mark.parametrize("rows", [1, 4])
def test_bytes_of_limited_text_are_those_of_the_metric(packed_text: Callable[..., PackedText], rows: int) -> None:
    """A tokenizer with few characters decodes to fewer bytes than the text has."""
    data = packed_text(tokenizer="char", vocab_size=16, validation_share=0.2)
    data.setup("validate")
    expected = data.validation_dataset.make_batch(range(rows))["text_bytes"].sum().item()
    ids, n_bytes = data.validation_text(rows)
    assert n_bytes == expected
    assert n_bytes != sum(data.token_bytes[id_] for id_ in ids[1:])


@pytest.mark.parametrize("limit", [1, 1.0])
def test_baselines_of_a_classifier_are_of_the_validated_records(
    trainer: Callable[..., L.Trainer], cache: object, limit: float
) -> None:
    baselines = BaselineMetrics()
    data = LabelledText(block_size=32, batch_size=4, vocab_size=300, cache=str(cache))
    task = Classification(gpt=TINY, compile=False)
    trainer(max_steps=1, callbacks=[baselines], limit_val_batches=limit).fit(task, data)

    def labelled(split: RecordSplit) -> LabelledTexts:
        records = [data.records[index][1] for index in data.split_indices[split]]
        return LabelledTexts(
            [record.text for record in records], [data.class_names.index(record.label) for record in records]
        )

    validated = LabelledTexts(*(each[: 4 if isinstance(limit, int) else None] for each in labelled("validation")))
    share = validated.labels.count(int(np.argmax(data.class_counts))) / len(validated.labels)
    assert baselines.metric == "val/accuracy"
    assert baselines.figures == {"majority class": share, **word_baseline(labelled("train"), validated)}


@pytest.mark.parametrize("is_file", [False, True])
def test_provenance_records_whether_the_text_is_on_the_hub(
    trainer: Callable[..., L.Trainer],
    task: Callable[..., LanguageModel],
    packed_text: Callable[..., PackedText],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_file: bool,
) -> None:
    """Also in the token store, whose text may have been removed before training."""
    source, texts = "owner/texts.jsonl", [{"text": sentences(n)} for n in range(40)]
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(hub, "dataset_revision", lambda *_: "revision")
        patch.setattr(hub, "read_dataset_rows", lambda *_: (TableRow(str(n), "", row) for n, row in enumerate(texts)))
        if is_file:
            Path("owner").mkdir()
            Path(source).write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
        packed_text(source=source, store="tokens").prepare_data()
    Path(source).unlink(missing_ok=True)
    for data in (
        packed_text(source=source, store="tokens"),
        PackedText(mixture=["tokens"], block_size=32, batch_size=4),
    ):
        folder = RunFolder.create(tmp_path / "runs", "pretrain")
        metadata = RunMetadata()
        metadata.folder = folder
        trainer(max_steps=1, limit_val_batches=0, callbacks=[metadata]).fit(task(), data)
        [session] = json.loads((folder.path / "provenance.json").read_text(encoding="utf-8"))["sessions"]
        assert session["hub_datasets"] == ([] if is_file else [source])
