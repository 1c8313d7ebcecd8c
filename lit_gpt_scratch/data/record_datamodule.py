"""Rows of a table as batches: read, split, encode, lay out. A stage of tuning is a subclass with three methods.

=================== ============================= =============================== ======================
stage               ``record``, of a row          ``sequences``, of a record      ``arrange``, of a side
=================== ============================= =============================== ======================
``LabelledText``    a text and its label          its ids, and its class          rows, filled up
``Conversations``   messages                      the template's; replies learned packed windows
``Preferences``     a prompt and two replies      the template's, with each       pairs, filled up
``Prompts``         messages to reply to          the template's; none learned    numbers of rows
=================== ============================= =============================== ======================
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from platformdirs import user_cache_path

from lit_gpt_scratch.checkpoint.init_from import load_initial_tokenizer
from lit_gpt_scratch.data.base_datamodule import BaseDataModule, RowDataset, reject_null, require_positive_ints
from lit_gpt_scratch.data.record_split import (
    RECORD_SPLITS,
    RecordIndices,
    RecordSplit,
    count_training_copies,
    split_records,
    validate_shares,
)
from lit_gpt_scratch.data.resolve_tokenizer import resolve_tokenizer, train_or_load_tokenizer
from lit_gpt_scratch.data.tokenized_examples import (
    LENGTH_POLICIES,
    EncodedSequence,
    ExampleCounts,
    LengthPolicy,
    TextRecord,
    TokenizedExample,
    hash_examples,
    limit_length,
)
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import hub, synthetic_data
from lit_gpt_scratch.text.document import TableRow
from lit_gpt_scratch.text.row_readers import Columns
from lit_gpt_scratch.text.sources import DocumentSource
from lit_gpt_scratch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


R = TypeVar("R", bound=TextRecord)


class RecordDataModule(BaseDataModule, ABC, Generic[R]):
    """Records of a table, split by chance, encoded and laid out.

    Args:
        source: A file of rows (JSONL, JSON, CSV, TSV, Parquet or Arrow, compressed or not), a folder of such, or a
            pattern with ``*``; ``owner/name`` of a dataset of the Hub. By default a few hundred that are generated.
        config: The configuration of a dataset of the Hub.
        split: The split of a dataset of the Hub.
        streaming: Read a dataset of the Hub as it comes, without keeping a copy.
        validation_share: Share of the records to validate on; by default the stage's own.
        test_share: Share of the records to test on; 0 holds none out for it; by default the stage's own.
        split_seed: Of the split, whatever the run's seed.
        copies_together: Put records that say the same on one side of the split; by default they are only counted.
        too_long: What becomes of a record that is longer than ``block_size``: ``refuse`` it by name, ``cut`` off its
            end, or ``drop`` it.
        tokenizer: The kind to train on the training records: ``bpe``, ``wordpiece``, ``unigram``, ``char`` or
            ``byte``. Or one to use, as a file or a folder. By default that of ``init_from``, or else ``bpe``.
        vocab_size: Tokens of the tokenizer that is trained, special ones included; by default 1,024, or as many as
            the records give.
        init_from: The model that is tuned, a checkpoint or a run's folder: its tokenizer is taken.
        cache: Folder for tokenizers that are trained; by default one in the user's cache folder.
        block_size: The most tokens in a row of a batch.
        batch_size: Rows per data-parallel rank and micro-batch.
        tokens_per_step: Tokens per optimizer step over all ranks, counted as if each row had ``block_size``; gradients
            of several micro-batches are accumulated to reach it. By default a step is one micro-batch.
        num_workers: Processes that load batches beside the training.
        seed: Seed of the order of rows; by default that of ``seed_everything``.

    Raises:
        UserError: A number is out of range, or arguments contradict each other.
    """

    columns: Columns | None = None
    """Columns to read; None for all."""
    shares: ClassVar[tuple[float, float]] = (0.1, 0.1)
    """Of validation and test, by default."""
    special_tokens: ClassVar[Sequence[str]] = ()
    """Of a tokenizer that is trained here."""

    def __init__(
        self,
        source: str | None = None,
        config: str | None = None,
        split: str = "train",
        streaming: bool = False,
        validation_share: float | None = None,
        test_share: float | None = None,
        split_seed: int = 0,
        copies_together: bool = False,
        too_long: LengthPolicy = "refuse",
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        init_from: str | None = None,
        cache: str | None = None,
        block_size: int = 256,
        batch_size: int = 8,
        tokens_per_step: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(block_size, batch_size, tokens_per_step, num_workers, seed)
        reject_null({"split": split, "split_seed": split_seed})
        require_positive_ints({"vocab_size": vocab_size})
        validation = self.shares[0] if validation_share is None else validation_share
        test = self.shares[1] if test_share is None else test_share
        if split_seed < 0:
            raise UserError(f"data.split_seed is {split_seed}; it must be 0 or more")
        if too_long not in LENGTH_POLICIES:
            raise UserError(f"data.too_long is {too_long}; it must be one of {', '.join(LENGTH_POLICIES)}")
        self.source = (
            None if source is None else DocumentSource(source, config=config, split=split, streaming=streaming)
        )
        if hub.asked(config, split, streaming) and not (self.source and self.source.on_hub):
            raise UserError(f"data.config, split and streaming are for datasets of the Hub; {self.origin} is none")
        self.held_out = validate_shares(validation, test)
        self.split_seed = split_seed
        self.copies_together = copies_together
        self.too_long = too_long
        self.tokenizer_spec = tokenizer
        self.requested_vocab_size = vocab_size
        self.init_from = init_from
        self.cache = Path(cache).expanduser() if cache else user_cache_path("lit_gpt_scratch")

    @abstractmethod
    def parse_row(self, fields: dict[str, Any]) -> R:
        """What a row says.

        Raises:
            UserError: It says nothing that can be learned; without its place.
        """

    @abstractmethod
    def encode_record(self, record: R) -> tuple[EncodedSequence, ...]:
        """A record as tokens, however long."""

    @abstractmethod
    def build_dataset(self, examples: Sequence[TokenizedExample]) -> RowDataset:
        """Records of one side as rows of batches."""

    @abstractmethod
    def default_rows(self) -> Iterator[TableRow]:
        """Rows for where no source is named."""

    def select_records(self, records: list[tuple[str, R]]) -> list[tuple[str, R]]:
        """Which records to take, each with the place of its row; by default all."""
        return records

    @property
    def origin(self) -> str:
        """Where the records come from, as a user wrote it."""
        return synthetic_data.SOURCE_NAME if self.source is None else self.source.name

    @cached_property
    def records(self) -> list[tuple[str, R]]:
        """All that are taken, each with the place of its row."""
        rows = self.default_rows() if self.source is None else self.source.rows(self.columns)
        return self.select_records([(row.where, self._read(row)) for row in rows])

    def _read(self, row: TableRow) -> R:
        try:
            return self.parse_row(row.fields)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error

    @cached_property
    def split_indices(self) -> dict[RecordSplit, RecordIndices]:
        """The records of each side, by their places."""
        return split_records(self._keys, self.held_out, self.split_seed, self.copies_together, self.origin)

    @cached_property
    def training_copies(self) -> dict[RecordSplit, int]:
        """How many held-out records say what one of the training says, too, but for case and space."""
        found = count_training_copies(self._keys, self.split_indices)
        for side, n in found.items():
            if n:
                log.info("%s: %d of %d records have a copy in training", side, n, len(self.split_indices[side]))
        return found

    @cached_property
    def _keys(self) -> list[str]:
        return ["\0".join(" ".join(text.split()).casefold() for text in record.texts) for _, record in self.records]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the model which is tuned, or the one that was given, or one trained on the training records."""
        own = load_initial_tokenizer(self.init_from) if self.init_from is not None else None
        found = resolve_tokenizer(own, self.init_from, self.tokenizer_spec)
        if found is not None:
            if self.requested_vocab_size is not None:
                raise UserError("data.vocab_size is of a tokenizer that is trained here; leave it out")
            return found
        texts = [text for place in self.split_indices["train"] for text in self.records[place][1].texts]
        kind = self.tokenizer_spec or "bpe"
        return train_or_load_tokenizer(
            texts, kind, self.requested_vocab_size, self.special_tokens, self.cache, self.origin
        )

    @property
    def max_record_tokens(self) -> int:
        """The most tokens of a record."""
        return self.block_size

    @cached_property
    def examples(self) -> dict[RecordSplit, list[TokenizedExample]]:
        """Of each side, its records in tokens."""
        found: dict[RecordSplit, list[TokenizedExample]] = {}
        for side in (side for side in RECORD_SPLITS if side in self.split_indices):
            records = (self.records[place] for place in self.split_indices[side])
            examples = (TokenizedExample(where, self.encode_record(record)) for where, record in records)
            found[side] = limit_length(examples, self.max_record_tokens, self.too_long, side)
        return found

    @property
    def split_counts(self) -> dict[RecordSplit, ExampleCounts]:
        """What is on each side."""
        return {side: ExampleCounts.of(examples) for side, examples in self.examples.items()}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what a run learns from and is measured on: ids, labels and sides, and the room of a row."""
        found = hashlib.sha256(f"{type(self).__name__} {self.block_size}".encode())
        for side, examples in self.examples.items():
            found.update(side.encode() + hash_examples(examples))
        return found.hexdigest()

    def prepare_data(self) -> None:
        """Read, split and encode; training a tokenizer is done here, once."""
        _ = self.examples, self.training_copies

    def setup(self, stage: str) -> None:
        """Lay the rows of batches, and settle how many micro-batches make a step.

        Raises:
            UserError: The records are too few, or ``tokens_per_step`` cannot be reached.
        """
        for side, examples in self.examples.items():
            if not examples:
                raise UserError(
                    f"{self.origin}: no record of {side} fits into {self.block_size} tokens; raise --data.block_size"
                )
        self.train_dataset = self.build_dataset(self.examples["train"])
        self.validation_dataset = self.build_dataset(self.examples["validation"])
        self.test_dataset = self.build_dataset(self.examples["test"]) if "test" in self.examples else None
        batch = self.batch_size * self.shard["num_replicas"]
        if stage == "fit" and len(self.train_dataset) < batch:
            raise UserError(
                f"{self.origin} has {len(self.train_dataset)} rows for training, fewer than one batch of {batch}; name "
                "more records, or lower --data.batch_size"
            )
        if stage == "fit":
            self.accumulate()
