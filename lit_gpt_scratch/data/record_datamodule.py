"""Base class for data modules that read, split, tokenize and batch the rows of a table.

Each stage of fine-tuning has its own subclass:

=================== ======================== ============================================ =================
class               ``parse_row`` returns    ``encode_record`` returns                    ``build_dataset``
=================== ======================== ============================================ =================
``LabelledText``    a text and its label     token ids and a class index                  padded rows
``Conversations``   messages                 the rendered template; labels on replies     packed windows
``Preferences``     a prompt and two replies the rendered template, once with each reply  padded pairs
``Prompts``         messages of the prompt   the rendered template; no labels             prompt indices
=================== ======================== ============================================ =================
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, TypeVar

from platformdirs import user_cache_path

from lit_gpt_scratch.data.base_datamodule import BaseDataModule, SplitCounts, reject_null, require_positive_ints
from lit_gpt_scratch.data.prepare_tokens import DEFAULT_KIND, default_tokenizer
from lit_gpt_scratch.data.record_split import (
    RECORD_SPLITS,
    RecordIndices,
    RecordSplit,
    count_training_copies,
    split_records,
    validate_shares,
)
from lit_gpt_scratch.data.resolve_tokenizer import resolve_tokenizer, train_or_load_tokenizer
from lit_gpt_scratch.data.sampler import RowDataset
from lit_gpt_scratch.data.tokenized_examples import (
    EncodedSequence,
    LengthPolicy,
    TextRecord,
    TokenizedExample,
    hash_examples,
    limit_length,
)
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import hub, synthetic_data
from lit_gpt_scratch.text.document import TableRow, first_words
from lit_gpt_scratch.text.file_readers import Columns
from lit_gpt_scratch.text.sources import DocumentSource
from lit_gpt_scratch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MIN_VALIDATION_RECORDS: Final = 100
"""Number of validation records below which a warning is logged."""

R = TypeVar("R", bound=TextRecord)


class RecordDataModule(BaseDataModule, ABC, Generic[R]):
    """Base class for data modules that read records from a table, split them at random and tokenize them.

    Args:
        source: Records to read: a JSONL, JSON, CSV, TSV, Parquet or Arrow file, optionally compressed; a folder of such
            files, or a glob pattern; or a Hub dataset, as ``owner/name``. By default, a few hundred synthetic
            records.
        config: Configuration name of a Hub dataset.
        split: Split of a Hub dataset to read.
        streaming: Whether to stream a Hub dataset instead of downloading it.
        validation_share: Fraction of the records held out for validation. The default depends on the class.
        test_share: Fraction of the records held out for testing; 0 omits the test split. The default depends on the
            class.
        split_seed: Seed for the split, independent of the run's seed.
        copies_together: Whether to put duplicate records into the same split. By default, duplicates are split like
            other records, and the number of held-out records that also occur in the training split is logged.
        too_long: How to handle a record longer than ``block_size``: ``refuse`` raises an error that names the record;
            ``cut`` truncates it at the end; ``drop`` skips it; ``windows`` splits it into windows. The default is
            ``windows`` for ``LabelledText``, the only class that supports it, and ``refuse`` for other classes.
        tokenizer: Type of tokenizer to train on the training records (``bpe``, ``wordpiece``, ``unigram``, ``char`` or
            ``byte``), or the file or folder of an existing tokenizer. By default, the tokenizer of ``init_from``, or
            ``bpe`` if ``init_from`` is not set.
        vocab_size: Vocabulary size of a trained tokenizer, including special tokens. By default 1,024, or less if the
            records yield fewer tokens.
        init_from: Checkpoint or run folder of the model to fine-tune; its tokenizer is used. ``fit`` sets this to
            ``model.init_from``.
        cache: Folder for trained tokenizers. By default, a folder in the user's cache directory.
        block_size: Maximum number of tokens per row.
        batch_size: Number of rows per micro-batch on each data-parallel rank.
        tokens_per_step: Number of tokens per optimizer step across all ranks, counting ``block_size`` tokens for each
            row; gradients are accumulated over micro-batches to reach this number. By default,
            ``trainer.accumulate_grad_batches`` sets the number of micro-batches per step.
        num_workers: Number of DataLoader worker processes; 0 loads batches in the training process.
        seed: Seed for the row order; by default, the value of ``seed_everything``.

    Raises:
        UserError: An argument is invalid, or arguments conflict.
    """

    item_name = "record"
    columns: Columns | None = None
    """Columns to read; None reads all columns."""
    shares: ClassVar[tuple[float, float]] = (0.1, 0.1)
    """Default fractions of the records that are held out for validation and for testing."""
    length_policies: ClassVar[Sequence[LengthPolicy]] = ("refuse", "cut", "drop")
    """Supported values of ``too_long``; the first one is the default."""
    special_tokens: ClassVar[Sequence[str]] = ()
    """Special tokens of a tokenizer trained on these records."""

    @classmethod
    def default_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values used for arguments that are ``None``; ``fit`` saves these values in ``config.yaml``."""
        shares = {"validation_share": cls.shares[0], "test_share": cls.shares[1]}
        return {**shares, "too_long": cls.length_policies[0], **default_tokenizer(arguments)}

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
        too_long: LengthPolicy | None = None,
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
        too_long = self.length_policies[0] if too_long is None else too_long
        if too_long not in self.length_policies:
            raise UserError(f"data.too_long is {too_long}; it must be one of {', '.join(self.length_policies)}")
        self.source = (
            None if source is None else DocumentSource(source, config=config, split=split, streaming=streaming)
        )
        if hub.has_hub_options(config, split, streaming) and not (self.source and self.source.on_hub):
            raise UserError(
                f"data.config, data.split and data.streaming require a Hub dataset, but {self.origin} is not one; "
                "omit them"
            )
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
        """Parse a row into a record.

        Raises:
            UserError: The row is invalid. The caller adds the location of the row to the message.
        """

    @abstractmethod
    def encode_record(self, record: R) -> tuple[EncodedSequence, ...]:
        """Tokenize a record, without a length limit.

        Raises:
            UserError: The record cannot be tokenized. The caller adds the location of the row to the message.
        """

    @abstractmethod
    def build_dataset(self, examples: Sequence[TokenizedExample]) -> RowDataset[Any]:
        """Build the dataset of one split."""

    @abstractmethod
    def default_rows(self) -> Iterator[TableRow]:
        """Generate the synthetic rows that are used if no source is given."""

    def select_records(self, records: list[tuple[str, R]]) -> list[tuple[str, R]]:
        """Return the records to use, by default all of them. Each record is paired with the location of its row."""
        return records

    @property
    def origin(self) -> str:
        """Source of the records, as specified by the user."""
        return synthetic_data.SOURCE_NAME if self.source is None else self.source.name

    @cached_property
    def records(self) -> list[tuple[str, R]]:
        """Selected records, each paired with the location of its row."""
        rows = self.default_rows() if self.source is None else self.source.rows(self.columns)
        return self.select_records([(row.where, self._read(row)) for row in rows])

    def _read(self, row: TableRow) -> R:
        try:
            return self.parse_row(row.fields)
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error

    def _encode(self, where: str, record: R) -> tuple[EncodedSequence, ...]:
        try:
            return self.encode_record(record)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    @property
    def example_text(self) -> str:
        """First words of a validation record."""
        return first_words(self.records[self.split_indices["validation"][0]][1].texts[0])

    @cached_property
    def split_indices(self) -> dict[RecordSplit, RecordIndices]:
        """Indices into ``records`` for each split."""
        return split_records(self._keys, self.held_out, self.split_seed, self.copies_together, self.origin)

    @cached_property
    def training_copies(self) -> dict[RecordSplit, int]:
        """Number of records in each held-out split that also occur in the training split.

        Records are compared without regard to case and whitespace.
        """
        found = count_training_copies(self._keys, self.split_indices)
        for split, n in found.items():
            if n:
                log.info(
                    "%s: %d of %d records have a copy in the training split", split, n, len(self.split_indices[split])
                )
        return found

    @cached_property
    def _keys(self) -> list[str]:
        return ["\0".join(" ".join(text.split()).casefold() for text in record.texts) for _, record in self.records]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer, taken from the model to fine-tune, loaded from a path, or trained on the training records."""
        found = resolve_tokenizer(self.load_initial_tokenizer(), self.init_from, self.tokenizer_spec)
        if found is not None:
            if self.requested_vocab_size is not None:
                raise UserError(
                    "data.vocab_size applies only to a tokenizer trained on this data; omit data.vocab_size"
                )
            return found
        texts = [text for place in self.split_indices["train"] for text in self.records[place][1].texts]
        kind = self.tokenizer_spec or DEFAULT_KIND
        return train_or_load_tokenizer(
            texts, kind, self.requested_vocab_size, self.special_tokens, self.cache, self.origin
        )

    @property
    def max_record_tokens(self) -> int:
        """Maximum number of tokens per record."""
        return self.block_size

    @cached_property
    def examples(self) -> dict[RecordSplit, list[TokenizedExample]]:
        """Tokenized examples of each split."""
        found: dict[RecordSplit, list[TokenizedExample]] = {}
        for split in (name for name in RECORD_SPLITS if name in self.split_indices):
            records = (self.records[index] for index in self.split_indices[split])
            examples = (TokenizedExample(where, self._encode(where, record)) for where, record in records)
            found[split] = limit_length(examples, self.max_record_tokens, self.too_long, split)
        return found

    @property
    def split_counts(self) -> dict[str, SplitCounts]:
        """Number of records and tokens in each split."""
        return {
            split: SplitCounts(
                len(examples),
                sum(len(sequence.ids) for example in examples for sequence in example.sequences),
            )
            for split, examples in self.examples.items()
        }

    def validation_warnings(self) -> Iterator[str]:
        """Yield a warning if there are few validation records, or if a record's copies do not fit into a split."""
        if self.copies_together:
            key, n_copies = Counter(self._keys).most_common(1)[0]
            if n_copies > max(1, min(self.held_out.values()) * len(self._keys)):
                index = self._keys.index(key)
                split = next(split for split, indices in self.split_indices.items() if index in indices)
                yield (
                    f"{n_copies:,} of {len(self._keys):,} records are copies of each other, more than fit into a "
                    f"held-out split, and --data.copies_together puts all of them into the {split} split; remove copies"
                )
        n = len(self.examples["validation"])
        if n < MIN_VALIDATION_RECORDS:
            yield (
                f"only {n} record{'s' if n > 1 else ''} for validation: one more correct answer changes accuracy by "
                f"{1 / n:.1%}; use more records, or raise --data.validation_share"
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the class name, ``block_size``, and the token ids and labels of all splits."""
        found = hashlib.sha256(f"{type(self).__name__} {self.block_size}".encode())
        for split, examples in self.examples.items():
            found.update(split.encode() + hash_examples(examples))
        return found.hexdigest()

    @property
    def hub_datasets(self) -> tuple[str, ...]:
        """Name of the source, if it is a Hub dataset."""
        return (self.source.name,) if self.source is not None and self.source.on_hub else ()

    def prepare_data(self) -> None:
        """Read, split and tokenize the records; train a tokenizer if there is none yet."""
        _ = self.examples, self.training_copies

    def setup(self, stage: str) -> None:
        """Build the datasets and set the number of micro-batches per step.

        Raises:
            UserError: There are too few records, or ``tokens_per_step`` does not match the batch size.
        """
        for split, examples in self.examples.items():
            if not examples:
                raise UserError(
                    f"{self.origin}: no {split} record fits into {self.max_record_tokens} tokens; "
                    "raise --data.block_size"
                )
        self.train_dataset = self.build_dataset(self.examples["train"])
        self.validation_dataset = self.build_dataset(self.examples["validation"])
        self.test_dataset = self.build_dataset(self.examples["test"]) if "test" in self.examples else None
        batch = self.batch_size * self.shard["num_replicas"]
        if stage == "fit" and len(self.train_dataset) < batch:
            raise UserError(
                f"{self.origin} has {len(self.train_dataset)} rows for training, fewer than one batch of {batch}; add "
                "records, or lower --data.batch_size"
            )
        if stage == "fit":
            self.set_gradient_accumulation()
