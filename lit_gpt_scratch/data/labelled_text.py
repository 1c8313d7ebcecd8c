"""Data module for text classification."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX, DataInfo, LabelledBatch
from lit_gpt_scratch.data.base_datamodule import require_positive_ints
from lit_gpt_scratch.data.padding import EMPTY_ROW, PaddedDataset, pad_rows
from lit_gpt_scratch.data.record_datamodule import RecordDataModule
from lit_gpt_scratch.data.record_split import RecordSplit, shuffled_indices
from lit_gpt_scratch.data.sampler import RowIndices
from lit_gpt_scratch.data.tokenized_examples import EncodedSequence, TokenizedExample
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import synthetic_data
from lit_gpt_scratch.text.document import TableRow, get_label, get_text, is_blank
from lit_gpt_scratch.text.windows import MAX_WINDOWS, Windows


@dataclass(frozen=True)
class LabelledExample:
    """Text with its class label."""

    text: str
    label: str

    @property
    def texts(self) -> Sequence[str]:
        """The text without the label, so that duplicates are found regardless of their labels."""
        return (self.text,)


class LabelledText(RecordDataModule[LabelledExample]):
    """Data module for text with class labels. The classes are the distinct labels, sorted alphabetically.

    Args:
        text_column: Column that contains the text.
        label_column: Column that contains the label, a string or an integer. If the dataset defines class names, they
            replace integer labels.
        max_windows: Maximum number of windows of ``block_size`` tokens per record if ``too_long`` is ``windows``; the
            tokens after the last window are discarded.
        balance: Whether to downsample each class to the size of the smallest class; ``split_seed`` determines which
            records are kept.
        **kwargs: See ``RecordDataModule``.
    """

    shares = (0.1, 0.2)
    length_policies = ("windows", "refuse", "cut", "drop")
    next_command = "evaluate {} --text {text}"

    def __init__(
        self,
        text_column: str = "text",
        label_column: str = "label",
        balance: bool = False,
        max_windows: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_positive_ints({"max_windows": max_windows})
        if max_windows > MAX_WINDOWS:
            raise UserError(f"data.max_windows is {max_windows}; it must be at most {MAX_WINDOWS}")
        self.max_windows = max_windows if self.too_long == "windows" else 1
        self.text_column = text_column
        self.label_column = label_column
        self.columns = {"text_column": text_column, "label_column": label_column}
        self.balance = balance

    def default_rows(self) -> Iterator[TableRow]:
        """Generate synthetic sentences with class labels."""
        return synthetic_data.labelled_sentences()

    def parse_row(self, fields: dict[str, Any]) -> LabelledExample:
        """Parse the text and the label of a row."""
        text = get_text(fields, self.text_column)
        if is_blank(text):
            raise UserError(f"'{self.text_column}' is empty; add the text, or remove the row")
        return LabelledExample(text, get_label(fields, self.label_column))

    def select_records(self, records: list[tuple[str, LabelledExample]]) -> list[tuple[str, LabelledExample]]:
        """Return all records or, with ``balance``, the same number of records for each class."""
        counts = Counter(record.label for _, record in records)
        if len(counts) < 2:
            found = f"only the class '{next(iter(counts))}'" if counts else "no records"
            raise UserError(f"{self.origin} has {found}; classification requires at least two classes")
        if not self.balance:
            return records
        remaining = dict.fromkeys(counts, min(counts.values()))
        taken = []
        for index in shuffled_indices(len(records), self.split_seed, purpose=1):
            label = records[index][1].label
            if remaining[label]:
                remaining[label] -= 1
                taken.append(index)
        return [records[index] for index in sorted(taken)]

    @cached_property
    def class_names(self) -> list[str]:
        """Class names, ordered by class index."""
        return sorted({record.label for _, record in self.records})

    @property
    def class_counts(self) -> list[int]:
        """Number of training records in each class."""
        classes = [int(example.sequences[0].labels[0]) for example in self.examples["train"]]
        counts: list[int] = np.bincount(classes, minlength=len(self.class_names)).tolist()
        return counts

    @property
    def windows_per_row(self) -> int:
        """Mean number of windows per training record, rounded up."""
        counts = [len(example.sequences) for example in self.examples["train"]]
        return -(-sum(counts) // len(counts))

    def labelled_texts(self, split: str, rows: int | None = None) -> tuple[list[str], list[int]]:
        """Return the texts of a split, truncated like the model's input, and their class indices."""
        examples = self.examples[cast(RecordSplit, split)][:rows]
        ids = (np.concatenate([part.ids[1:] for part in example.sequences]) for example in examples)
        texts = [self.tokenizer.decode(text.tolist()) for text in ids]
        return texts, [int(example.sequences[0].labels[0]) for example in examples]

    def setup(self, stage: str) -> None:
        """Build the datasets.

        Raises:
            UserError: A class has no training records, or ``RecordDataModule.setup`` raises an error.
        """
        for name, count in zip(self.class_names, self.class_counts, strict=True):
            if not count:
                raise UserError(
                    f"{self.origin}: class '{name}' has no records left for training; add records, or change "
                    "--data.split_seed"
                )
        super().setup(stage)

    @property
    def info(self) -> DataInfo:
        """Description of the data, including class names and class counts."""
        return replace(
            super().info,
            class_names=self.class_names,
            class_counts=self.class_counts,
            max_windows=self.max_windows,
        )

    def encode_record(self, record: LabelledExample) -> tuple[EncodedSequence, ...]:
        """Tokenize a record's text into one sequence per window; the label of each sequence is the class index."""
        label = np.array([self.class_names.index(record.label)])
        ids = self.tokenizer.encode(record.text)
        if self.too_long == "windows":
            windows = Windows(self.block_size, self.max_windows)
            parts = windows.split(ids, self.tokenizer.start_of_text)
        else:
            parts = [[self.tokenizer.start_of_text, *ids]]
        return tuple(EncodedSequence(np.array(part), label) for part in parts)

    def build_dataset(self, examples: Sequence[TokenizedExample]) -> "LabelledTextDataset":
        """Build a dataset with one record per row."""
        items = [example.sequences for example in examples]
        return LabelledTextDataset(items, self.block_size, self.tokenizer.end_of_text)


class LabelledTextDataset(PaddedDataset[tuple[EncodedSequence, ...], LabelledBatch]):
    """Dataset of records with their class indices; each record has one or more right-padded windows."""

    def __init__(self, items: Sequence[tuple[EncodedSequence, ...]], block_size: int, fill: int) -> None:
        super().__init__(items, block_size, fill)
        self.has_windows = any(len(item) > 1 for item in items)

    def make_batch(self, rows: Sequence[int]) -> LabelledBatch:
        """Build the batch for the given row indices; the index ``len(self)`` denotes a padding row."""
        texts = [self.items[row] if row < len(self) else None for row in rows]
        windows = [ids for text in texts for ids in ([part.ids for part in text] if text else [EMPTY_ROW])]
        batch = LabelledBatch(
            input_ids=pad_rows(windows, self.fill, self.block_size),
            lengths=torch.tensor([len(ids) for ids in windows]),
            labels=torch.tensor([int(text[0].labels[0]) if text else IGNORE_INDEX for text in texts]),
        )
        if self.has_windows:
            batch["window_counts"] = torch.tensor([len(text) if text else 1 for text in texts])
        return batch

    def count_labels(self, rows: RowIndices) -> dict[str, Tensor]:
        """Count the rows of each class, and return the counts, of shape (n_classes,), as ``step_class_counts``."""
        classes = np.array([int(self.items[row][0].labels[0]) for row in rows])
        n_classes = 1 + max(int(item[0].labels[0]) for item in self.items)  # every class has training records
        return {"step_class_counts": torch.from_numpy(np.bincount(classes, minlength=n_classes))}
