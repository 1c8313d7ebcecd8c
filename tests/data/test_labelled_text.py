"""Labelled text: padded batches against brute force, classes, balancing."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.data import LabelledText
from lit_gpt_scratch.data.labelled_text import LabelledTextDataset
from lit_gpt_scratch.data.tokenized_examples import EncodedSequence
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.document import ClassIndex, get_label
from lit_gpt_scratch.text.sources import DocumentSource

FILL = 99


@given(
    texts=st.lists(st.lists(st.integers(0, 98), min_size=1, max_size=21), min_size=1, max_size=9),
    block_size=st.sampled_from([21, 24, 64]),
    data=st.data(),
)
@settings(max_examples=100)
def test_padded_batches_match_brute_force(texts: list[list[int]], block_size: int, data: st.DataObject) -> None:
    rows = LabelledTextDataset(
        [(EncodedSequence(np.array(ids), np.array([len(ids) % 3])),) for ids in texts], block_size, FILL
    )
    indices = data.draw(st.lists(st.integers(0, len(texts)), min_size=1, max_size=12))
    batch = rows.make_batch(indices)
    width = batch["input_ids"].shape[1]
    chosen = [texts[index] if index < len(texts) else [] for index in indices]
    assert batch["input_ids"].tolist() == [ids + [FILL] * (width - len(ids)) for ids in chosen]
    assert batch["lengths"].tolist() == [len(ids) for ids in chosen]
    assert batch["labels"].tolist() == [len(ids) % 3 if ids else IGNORE_INDEX for ids in chosen]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    longest = max(map(len, chosen))
    assert width == next(enough for enough in [*range(8, block_size, 8), block_size] if enough >= longest)


def uneven(path: Path) -> str:
    """Write 20, 40 and 60 records of three classes with integer labels."""
    lines = [f"{label}\ttext {n} of {label}\n" for label in (3, 1, 2) for n in range(20 * label)]
    path.write_text("labels\tmessage\n" + "".join(lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("balance", [False, True])
def test_classes_and_balancing(tmp_path: Path, balance: bool) -> None:
    source = uneven(tmp_path / "a.tsv")

    def build(seed: int) -> LabelledText:
        columns = {"text_column": "message", "label_column": "labels"}
        return LabelledText(
            source=source, **columns, balance=balance, split_seed=seed, tokenizer="byte", cache=str(tmp_path)
        )

    data = build(0)
    assert data.class_names == ["1", "2", "3"]
    expected = {"1": 20, "2": 20, "3": 20} if balance else {"1": 20, "2": 40, "3": 60}
    assert Counter(record.label for _, record in data.records) == expected
    in_training = Counter(data.records[place][1].label for place in data.split_indices["train"])
    assert data.class_counts == [in_training[name] for name in data.class_names]
    assert sum(data.class_counts) == data.split_counts["train"].items == round(0.7 * sum(expected.values()))
    texts = {record.text for _, record in data.records}
    assert (texts == {record.text for _, record in build(1).records}) is not balance


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (math.nan, "the label in 'label' is missing"),
        (None, "the label in 'label' is missing"),
        (" ", "the label in 'label' is missing"),
        (ClassIndex.from_names(-1, ["no", "yes"]), "the label in 'label' is missing"),
        (True, "'label' is True (bool); a label must be a string or an integer"),
        (0.5, "'label' is 0.5 (float); a label must be"),
        (math.inf, "'label' is inf (float); a label must be"),
        (["a"], "'label' is ['a'] (list); a label must be"),
    ],
)
def test_invalid_labels_are_rejected(label: object, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        get_label({"label": label}, "label")


def test_equivalent_labels_are_one_class() -> None:
    found = ["1", " 1", 1, 1.0, ClassIndex.from_names(0, ["1"])]
    assert {get_label({"label": label}, "label") for label in found} == {"1"}


def test_nan_label_is_reported_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n{"text": "y", "label": NaN}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: line 2: the label in 'label' is missing"):
        _ = LabelledText(source=str(tmp_path / "a.jsonl"), tokenizer="byte", cache=str(tmp_path)).records


def test_named_classes_keep_their_names(tmp_path: Path) -> None:
    """Reading the rows directly gives their numbers."""
    labels = [n % 2 for n in range(40)]
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})

    def kept(labels: list[int]) -> str:
        made = datasets.Dataset.from_dict({"text": [f"t{n}" for n in range(40)], "label": labels}, features=kinds)
        made.to_parquet(str(tmp_path / "a.parquet"))
        return str(tmp_path / "a.parquet")

    data = LabelledText(source=kept(labels), tokenizer="byte", cache=str(tmp_path))
    assert [record.label for _, record in data.records] == [["pos", "neg"][label] for label in labels]
    assert [row.fields["label"] for row in DocumentSource(kept(labels)).rows()] == labels
    with pytest.raises(UserError, match=r"row 40: the label in 'label' is missing"):
        _ = LabelledText(source=kept([*labels[:39], -1]), tokenizer="byte", cache=str(tmp_path)).records


@given(
    texts=st.lists(st.lists(st.lists(st.integers(0, 98), min_size=1, max_size=8), min_size=1, max_size=4), min_size=1),
    data=st.data(),
)
@settings(max_examples=50)
def test_windows_of_a_record_are_contiguous(texts: list[list[list[int]]], data: st.DataObject) -> None:
    items = [tuple(EncodedSequence(np.array(ids), np.array([n % 3])) for ids in text) for n, text in enumerate(texts)]
    indices = data.draw(st.lists(st.integers(0, len(texts)), min_size=1, max_size=12))
    batch = LabelledTextDataset(items, 8, FILL).make_batch(indices)
    chosen = [texts[index] if index < len(texts) else [[]] for index in indices]
    assert batch["input_ids"].tolist() == [ids + [FILL] * (8 - len(ids)) for text in chosen for ids in text]
    assert batch["lengths"].tolist() == [len(ids) for text in chosen for ids in text]
    assert batch["labels"].tolist() == [index % 3 if index < len(texts) else IGNORE_INDEX for index in indices]
    if max(map(len, texts)) > 1:
        assert batch["window_counts"].tolist() == [len(text) for text in chosen]
    else:
        assert "window_counts" not in batch


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [({}, [9, 10, 10]), ({"max_windows": 2}, [12, 12]), ({"too_long": "cut"}, [12]), ({"too_long": "drop"}, [])],
)
def test_long_records(tmp_path: Path, flags: dict[str, Any], sizes: list[int]) -> None:
    long = "a text of 26 bytes, no more"[:26]
    rows = "".join(f'{{"text": "{long if n < 20 else "short"}", "label": {n % 2}}}\n' for n in range(40))
    (tmp_path / "a.jsonl").write_text(rows)
    source = {"source": str(tmp_path / "a.jsonl"), "tokenizer": "byte", "cache": str(tmp_path)}
    data = LabelledText(**source, block_size=12, **flags)
    data.setup("fit")
    found = {tuple(len(part.ids) for part in example.sequences) for example in data.examples["train"]}
    assert found == {(6,), *([tuple(sizes)] if sizes else [])}
    read = "".join(long)[: sum(sizes) - len(sizes)]
    mean = sum(len(example.sequences) for example in data.examples["train"]) / len(data.examples["train"])
    assert data.windows_per_row == math.ceil(mean)
    assert data.tokens_per_batch == 8 * 12 * data.windows_per_row
    texts, labels = data.labelled_texts("train")
    assert set(texts) == {"short", *([read] if sizes else [])}
    assert len(labels) == len(texts)


def test_too_many_windows_are_rejected() -> None:
    with pytest.raises(UserError, match=r"data\.max_windows is 5000; it must be at most 1024"):
        LabelledText(max_windows=5000)


def test_records_start_with_the_start_of_text_token(tmp_path: Path) -> None:
    data = LabelledText(cache=str(tmp_path))
    data.setup("fit")
    place = int(data.split_indices["train"][0])
    _, record = data.records[place]
    [sequence] = data.examples["train"][0].sequences
    assert sequence.ids[0] == data.tokenizer.start_of_text
    assert data.tokenizer.decode(sequence.ids[1:].tolist()) == record.text
    assert data.class_names[int(sequence.labels[0])] == record.label
