"""Labelled text: the data of classification."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from lit_gpt_scratch.batch_types import IGNORE_INDEX, LabelledBatch
from lit_gpt_scratch.data.padding import EMPTY_ROW, PaddedDataset, pad_rows
from lit_gpt_scratch.data.record_datamodule import RecordDataModule
from lit_gpt_scratch.data.record_split import shuffled_indices
from lit_gpt_scratch.data.tokenized_examples import EncodedSequence, TokenizedExample
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import synthetic_data
from lit_gpt_scratch.text.document import TableRow, get_label, get_text, is_blank


@dataclass(frozen=True)
class LabelledExample:
    """A text and its label."""

    text: str
    label: str

    @property
    def texts(self) -> Sequence[str]:
        """The text: a copy is one whatever its label."""
        return (self.text,)


class LabelledText(RecordDataModule[LabelledExample]):
    """Texts of classes. The classes are the labels that there are, in the order of the alphabet.

    Args:
        text_column: The column with the text.
        label_column: The column with the label, a text or a whole number; a dataset that names its
            classes says their names.
        balance: Take as many records of each class as the smallest has; ``split_seed`` chooses which.
        **others: See ``RecordDataModule``.
    """

    shares = (0.1, 0.2)

    def __init__(
        self, text_column: str = "text", label_column: str = "label", balance: bool = False, **others: Any
    ) -> None:
        super().__init__(**others)
        self.text_column = text_column
        self.label_column = label_column
        self.columns = {"text_column": text_column, "label_column": label_column}
        self.balance = balance

    def default_rows(self) -> Iterator[TableRow]:
        """Sentences about things."""
        return synthetic_data.labelled_sentences()

    def parse_row(self, fields: dict[str, Any]) -> LabelledExample:
        """A text with its label."""
        text = get_text(fields, self.text_column)
        if is_blank(text):
            raise UserError(f"'{self.text_column}' is empty")
        return LabelledExample(text, get_label(fields, self.label_column))

    def select_records(self, records: list[tuple[str, LabelledExample]]) -> list[tuple[str, LabelledExample]]:
        """All, or as many of each class as the smallest has."""
        counts = Counter(record.label for _, record in records)
        if len(counts) < 2:
            there = f"only the class '{next(iter(counts))}'" if counts else "no record"
            raise UserError(f"{self.origin} has {there}; to tell classes apart takes two")
        if not self.balance:
            return records
        left = dict.fromkeys(counts, min(counts.values()))
        taken = []
        for place in shuffled_indices(len(records), self.split_seed, purpose=1):
            label = records[place][1].label
            if left[label]:
                left[label] -= 1
                taken.append(place)
        return [records[place] for place in sorted(taken)]

    @cached_property
    def class_names(self) -> list[str]:
        """By the number of each class."""
        return sorted({record.label for _, record in self.records})

    @property
    def class_counts(self) -> list[int]:
        """Training records of each class."""
        classes = [int(example.sequences[0].labels[0]) for example in self.examples["train"]]
        counts: list[int] = np.bincount(classes, minlength=len(self.class_names)).tolist()
        return counts

    def setup(self, stage: str) -> None:
        """Lay the rows of batches.

        Raises:
            UserError: Also, nothing is to be learned of a class.
        """
        for name, count in zip(self.class_names, self.class_counts, strict=True):
            if not count:
                raise UserError(
                    f"{self.origin}: no record of class '{name}' is left for training; name more, or another "
                    "--data.split_seed"
                )
        super().setup(stage)

    @property
    def uneven(self) -> bool:
        """Every row of the training has one label."""
        return False

    def encode(self, text: str) -> list[int]:
        """A text as the model reads it: the start of text, and its ids."""
        return [self.tokenizer.start_of_text, *self.tokenizer.encode(text)]

    def encode_record(self, record: LabelledExample) -> tuple[EncodedSequence, ...]:
        """The text's ids, and the class."""
        label = np.array([self.class_names.index(record.label)])
        return (EncodedSequence(np.array(self.encode(record.text)), label),)

    def build_dataset(self, examples: Sequence[TokenizedExample]) -> "LabelledTextDataset":
        """One record a row."""
        return LabelledTextDataset(
            [example.sequences[0] for example in examples], self.block_size, self.tokenizer.end_of_text
        )


class LabelledTextDataset(PaddedDataset[EncodedSequence, LabelledBatch]):
    """Texts, filled up at their right; of each its ids and its class."""

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """A whole batch; an index of ``len(self)`` is a row of no text."""
        rows = [self.items[index] if index < len(self) else None for index in indices]
        lengths = torch.tensor([len(row.ids) if row else 0 for row in rows])
        input_ids = pad_rows([row.ids if row else EMPTY_ROW for row in rows], self.fill, self.block_size)
        labels = torch.tensor([int(row.labels[0]) if row else IGNORE_INDEX for row in rows])
        return LabelledBatch(input_ids=input_ids, lengths=lengths, labels=labels)
