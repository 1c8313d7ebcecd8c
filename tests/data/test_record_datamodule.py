"""All record data modules: common behaviour, the tokenizer, and errors that name the row."""

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse
import lightning as L
import pytest
import torch

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from lit_gpt_scratch.data import Conversations, LabelledText, PackedText, Preferences, Prompts
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.data.record_datamodule import RecordDataModule
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import synthetic_data
from lit_gpt_scratch.text.tokenizer import Tokenizer

STAGES: list[type[RecordDataModule[Any]]] = [LabelledText, Conversations, Preferences]


@pytest.fixture
def build(cache: Path) -> Callable[..., RecordDataModule[Any]]:
    def built(stage: type[RecordDataModule[Any]], **changes: object) -> RecordDataModule[Any]:
        settings: dict[str, Any] = {"cache": str(cache), "block_size": 64, "batch_size": 4}
        return stage(**(settings | changes))

    return built


@pytest.fixture
def ready(
    build: Callable[..., RecordDataModule[Any]], packed_text: Callable[..., PackedText]
) -> Callable[..., BaseDataModule]:
    """Build any data module and set it up."""

    def made(stage: type[BaseDataModule], **changes: object) -> BaseDataModule:
        data = packed_text(**changes) if stage is PackedText else build(stage, **changes)
        data.prepare_data()
        data.setup("fit")
        return data

    return made


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows_of(batch: dict[str, torch.Tensor]) -> list[bytes]:
    """Each row of a batch as bytes, without padding."""
    width = batch["input_ids"].shape[1]
    lengths = batch.get("lengths", torch.full((len(batch["input_ids"]),), width)).tolist()
    others = [batch[name] for name in ("labels", "lengths") if name in batch]
    return [
        b"".join(other[row].ravel()[:n].numpy().tobytes() for other in (batch["input_ids"], *others))
        for row, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("stage", [PackedText, *STAGES])
def test_ranks_divide_the_rows_of_one_process(
    ready: Callable[..., BaseDataModule], stage: type[BaseDataModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each training step has the same rows; validation and test have every row once."""

    def batches(loader: str, batch_size: int, rank: int, world: int) -> list[list[bytes]]:
        monkeypatch.setattr(BaseDataModule, "shard", {"num_replicas": world, "rank": rank})
        data = ready(stage, batch_size=batch_size, seed=3)
        if loader == "test_dataloader" and data.test_dataset is None:
            return []
        return [rows_of(batch) for batch in getattr(data, loader)()]

    alone = batches("train_dataloader", 4, 0, 1)
    ranks = [batches("train_dataloader", 2, rank, 2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(step) for step in alone]
    assert len(alone) > 2
    for loader in ("val_dataloader", "test_dataloader"):
        ranks = [batches(loader, 3, rank, 2) for rank in range(2)]
        assert len(ranks[0]) == len(ranks[1])
        every = sorted(row for rank in ranks for batch in rank for row in batch)
        once = sorted(row for batch in batches(loader, 1, 0, 1) for row in batch)
        assert [row for row in every if row in set(once)] == once


@pytest.mark.parametrize("stage", STAGES)
def test_order_can_start_anywhere_and_datasets_pickle(ready: Callable[..., BaseDataModule], stage: type) -> None:
    data = ready(stage)
    batches = list(data.train_dataloader())
    order = data.train_sampler
    order.start = (0, 2)
    later = list(data._loader(data.train_dataset, order))
    assert len(later) == len(batches) - 2
    assert all(same(a, b) for a, b in zip(batches[2:], later, strict=True))
    sent = pickle.loads(pickle.dumps(data.train_dataset))
    assert same(sent.make_batch([0, 1]), data.train_dataset.make_batch([0, 1]))


@pytest.mark.parametrize("stage", STAGES)
def test_common_properties(ready: Callable[..., BaseDataModule], stage: type) -> None:
    data = ready(stage)
    assert data.origin == synthetic_data.SOURCE_NAME
    assert Tokenizer.from_json(data.tokenizer_json).encode("a b") == data.tokenizer.encode("a b")
    assert data.vocab_size == len(data.token_bytes) == data.tokenizer.vocab_size
    assert sum(count.items for count in data.split_counts.values()) == (288 if stage is LabelledText else 576)
    assert list(data.split_counts) == ["train", "validation", "test"]
    for side, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
        labels = [batch["labels"] for batch in loader]
        assert sum(int((some != IGNORE_INDEX).sum()) for some in labels) == sum(
            example.n_labels for example in data.examples[side]
        )
    assert ready(stage, test_share=0).test_dataset is None
    with pytest.raises(UserError, match="has no test split"):
        ready(stage, test_share=0).test_dataloader()


@pytest.mark.parametrize("stage", STAGES)
def test_fingerprint_depends_on_rows_split_and_encoding(
    build: Callable[..., RecordDataModule[Any]], stage: type
) -> None:
    same_again = {build(stage, **changes).fingerprint for changes in ({}, {"batch_size": 2}, {"seed": 4})}
    others: list[dict[str, Any]] = [{"split_seed": 1}, {"test_share": 0.3}, {"vocab_size": 300}, {"block_size": 63}]
    found = [build(stage, **changes).fingerprint for changes in others]
    assert len(same_again) == 1
    assert len({*same_again, *found}) == 1 + len(others)


def write(path: Path, content: str | list[Any]) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def talks(n: int, words: int = 1) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}", "output": " ".join([str(i)] * words)} for i in range(n)]


def test_tokenizer_is_trained_on_training_records_only(
    build: Callable[..., RecordDataModule[Any]], tmp_path: Path
) -> None:
    marks = "ⴰⴱⴳⴷⴹⴻⴼⴽⵀⵃ"
    source = write(tmp_path / "a.json", [{"instruction": f"Say {mark}", "output": mark * 9} for mark in marks * 3])
    data = build(Conversations, source=source, tokenizer="char", copies_together=True, test_share=0.2)
    sides = {
        side: {message.content[-1] for place in places for message in data.records[place][1].messages}
        for side, places in data.split_indices.items()
    }
    learned = set(data.tokenizer.tokens())
    assert sides["train"] <= learned
    assert not (sides["test"] | sides["validation"]) & learned
    assert [data.tokenizer.special_token_id(f"<|{role}|>") for role in ("system", "user", "assistant")] == [1, 2, 3]
    assert build(LabelledText).tokenizer.special_token_id("<|user|>") is None


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """A checkpoint with a tokenizer and no weights."""
    tokenizer = Tokenizer.train(["a b c"] * 9, 300, "bpe").to_json()
    contents = CheckpointMetadata({}, 300, 16, tokenizer, start_of_text=5)
    torch.save({METADATA_KEY: asdict(contents), "state_dict": {}}, tmp_path / "model.ckpt")
    return str(tmp_path / "model.ckpt")


@pytest.mark.parametrize("stage", STAGES)
def test_tokenizer_of_the_initial_model(
    build: Callable[..., RecordDataModule[Any]], checkpoint: str, tmp_path: Path, stage: type
) -> None:
    data = build(stage, init_from=checkpoint, block_size=200)
    own, path = data.tokenizer, tmp_path / "tokenizer.json"
    assert own.start_of_text == 5
    assert {example.sequences[0].ids[0] for example in data.examples["train"]} == {5}
    own.save(path)
    assert build(stage, init_from=checkpoint, tokenizer=str(path)).tokenizer.start_of_text == 5
    assert build(stage, tokenizer=str(path)).tokenizer.to_json() == own.to_json()
    Tokenizer.train([], 300, "byte").save(path)
    for changes in ({"tokenizer": str(path)}, {"tokenizer": "bpe"}):
        with pytest.raises(UserError, match=r"data.tokenizer differs from the tokenizer of the model in .*model.ckpt"):
            _ = build(stage, init_from=checkpoint, **changes).tokenizer
    with pytest.raises(UserError, match=r"data.vocab_size applies only to a tokenizer trained on this data"):
        _ = build(stage, init_from=checkpoint, vocab_size=300).tokenizer
    with pytest.raises(UserError, match="no checkpoint at"):
        _ = build(stage, init_from=str(tmp_path / "none.ckpt")).tokenizer


@pytest.mark.parametrize("stage", STAGES)
def test_swapping_the_class_keeps_no_default_of_the_previous_class(stage: type) -> None:
    """``--data`` keeps arguments of the same name; the default source of ``PackedText`` must not be kept."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(BaseDataModule, "data")
    parser.set_defaults({"data": {"class_path": "lit_gpt_scratch.data.PackedText"}})
    given = parser.parse_args([f"--data={stage.__name__}", "--data.batch_size=2"]).data.init_args
    alone = parser.parse_args([f"--data=lit_gpt_scratch.data.{stage.__name__}"]).data.init_args
    for data in (stage(**given), stage(**alone)):
        assert (data.source, data.held_out["validation"]) == (None, stage.shares[0])


def test_too_long_records_are_rejected_truncated_or_dropped(
    build: Callable[..., RecordDataModule[Any]], tmp_path: Path
) -> None:
    records = talks(40)
    records[7] = {"instruction": "Say 7", "output": "7" * 99}  # keeps some labels when truncated
    records[30] = {"instruction": "Say 30" * 99, "output": "30"}  # loses all labels when truncated
    source = write(tmp_path / "a.json", records)

    def sizes(**changes: object) -> list[int]:
        data = build(Conversations, source=source, tokenizer="byte", **changes)
        return sorted(len(one.sequences[0].ids) for examples in data.examples.values() for one in examples)

    # <|endoftext|><|user|>Say 7\n<|assistant|>, and 99 digits; the end of text is only a label
    with pytest.raises(UserError, match=r"a.json: row 8 has 108 tokens, more than the maximum of 64; raise"):
        sizes()
    assert len(sizes(too_long="drop")) == 38
    assert sizes(too_long="cut")[-2:] == [12, 64]
    assert len(sizes(too_long="cut")) == 39
    assert sizes(block_size=1000)[-2] == 108


def test_training_copies_ignore_case_and_whitespace(
    build: Callable[..., RecordDataModule[Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [text for n in range(20) for text in (f"text {n}", f" Text  {n}\n")]
    source = write(tmp_path / "a.json", [{"text": text, "label": n % 2} for n, text in enumerate(texts)])
    data = build(LabelledText, source=source)
    with caplog.at_level("INFO", logger="lit_gpt_scratch"):
        data.prepare_data()
    twin = [set(data.split_indices["train"].tolist()) & {place ^ 1} for place in data.split_indices["test"].tolist()]
    assert data.training_copies["test"] == sum(map(bool, twin)) > 0
    assert f"test: {data.training_copies['test']} of 8 records have a copy in the training split" in caplog.text
    assert not any(build(LabelledText, source=source, copies_together=True).training_copies.values())


def test_copies_that_exceed_a_split_are_warned_of(build: Callable[..., RecordDataModule[Any]], tmp_path: Path) -> None:
    texts = [*(["the same"] * 60), *(f"text {n}" for n in range(200))]
    source = write(tmp_path / "a.json", [{"text": text, "label": n % 2} for n, text in enumerate(texts)])
    for together in (True, False):
        warnings = list(build(LabelledText, source=source, copies_together=together).validation_warnings())
        found = [warning for warning in warnings if warning.startswith("60 of 260 records are copies of each other")]
        assert len(found) == together
        assert all("puts all of them into the train split" in warning for warning in found)


LABELLED = "text,label\n" + "".join(f"text {n},{'ab'[n % 2]}\n" for n in range(40))
JSONL = "".join(json.dumps(row) + "\n" for row in talks(40))

FAULTS: dict[str, tuple[type, str, str | list[Any], dict[str, Any], str]] = {
    "column": (LabelledText, "a.csv", LABELLED, {"label_column": "y"},
               "a.csv has no column 'y'; set --data.label_column to an existing column"),
    "text column": (LabelledText, "a.csv", LABELLED, {"text_column": "x"}, "no column 'x'.*--data.text_column"),
    "label": (LabelledText, "a.csv", LABELLED + "more,\n", {}, "a.csv: line 42: the label in 'label' is missing"),
    "text": (LabelledText, "a.csv", LABELLED + '"",a\n', {}, "a.csv: line 42: 'text' is empty"),
    "null": (LabelledText, "a.json", [{"text": "a", "label": 1}, {"text": "b", "label": None}], {},
             "a.json: row 2: the label in 'label' is missing"),
    "kind": (LabelledText, "a.json", [{"text": "a", "label": [1]}], {},
             r"a.json: row 1: 'label' is \[1\] \(list\); a label must be"),
    "not text": (LabelledText, "a.json", [{"text": 7, "label": 1}], {},
                 "a.json: row 1: 'text' must be a string, but its type is int"),
    "class": (LabelledText, "a.csv", LABELLED.replace(",b", ",a"), {},
              "a.csv has only the class 'a'; classification requires at least two classes"),
    "rare": (LabelledText, "a.csv", LABELLED + "rare,c\n", {"split_seed": 1}, "class 'c' has no records left for tra"),
    "no row": (LabelledText, "a.csv", "text,label\n", {}, "a.csv has no records"),
    "long": (LabelledText, "a.csv", LABELLED + "long " * 99 + ",a\n", {"too_long": "refuse"},
             "a.csv: line 42 has .* the maximum of 64"),
    "few": (Conversations, "a.json", talks(4), {}, "a.json has only 4 records, which leaves none for the validation"),
    "batch": (Conversations, "a.json", talks(40), {"batch_size": 99}, "rows for training, fewer than one batch of 99"),
    "reply": (Conversations, "a.jsonl", JSONL + '{"instruction": "a", "output": ""}\n', {},
              "a.jsonl: line 41: message 2 has role assistant and no content"),
    "role": (Conversations, "a.json", [{"messages": [{"role": "human", "content": "a"}]}], {},
             "a.json: row 1: message 1 has role 'human'; the role must be one of system, user, assistant"),
    "begins": (Conversations, "a.json", [{"messages": [{"role": "assistant", "content": "a"}]}], {},
               "a.json: row 1: message 1 has role assistant but does not follow a user message"),
    "nothing fits": (Conversations, "a.json", talks(40, words=99), {"too_long": "drop"},
                     "no .* record fits into 64 tokens; raise --data.block_size"),
    "no prompt fits": (Prompts, "a.json", [{"prompt": f"{i} " * 99} for i in range(40)],
                       {"too_long": "drop", "reply_tokens": 16},
                       "no .* record fits into 48 tokens; raise --data.block_size"),
    "prose": (Conversations, "a.txt", "text", {}, "a.txt is not a table; use a Hub dataset or a file of type .jsonl"),
    "hub": (Conversations, "a.json", talks(40), {"split": "test"}, "data.streaming require a Hub dataset"),
    "too_long": (Conversations, "a.json", talks(9), {"too_long": "no"}, "data.too_long is no; it must be one of"),
    "seed": (Conversations, "a.json", talks(9), {"split_seed": -1}, "data.split_seed is -1; it must be 0 or more"),
    "vocabulary": (Conversations, "a.json", talks(40), {"vocab_size": 9999}, "data.vocab_size is 9,999, but .*only"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_invalid_data_is_reported_in_one_line_with_file_and_row(
    build: Callable[..., RecordDataModule[Any]], tmp_path: Path, fault: str
) -> None:
    stage, name, content, changes, message = FAULTS[fault]
    with pytest.raises(UserError, match=message) as error:
        build(stage, source=write(tmp_path / name, content), **changes).setup("fit")
    assert "\n" not in str(error.value)


def test_a_missing_file() -> None:
    with pytest.raises(UserError, match=r"no such file or folder: nowhere.csv"):
        LabelledText(source="nowhere.csv").prepare_data()


def test_synthetic_records_are_deterministic() -> None:
    for rows, n in ((synthetic_data.labelled_sentences, 288), (synthetic_data.conversations, 576)):
        found = [row.fields for row in rows()]
        assert found == [row.fields for row in rows()]
        assert len({json.dumps(fields) for fields in found}) == len(found) == n


def test_training_on_replies_reduces_the_loss(
    build: Callable[..., RecordDataModule[Any]],
    trainer: Callable[..., L.Trainer],
    task: Callable[..., L.LightningModule],
) -> None:
    run = trainer(max_steps=60, val_check_interval=60, check_val_every_n_epoch=None, accumulate_grad_batches=2)
    run.fit(task(), build(Conversations, vocab_size=300, tokens_per_step=512))
    assert run.callback_metrics["val/loss"] < 4.0  # from ln 300 = 5.7
