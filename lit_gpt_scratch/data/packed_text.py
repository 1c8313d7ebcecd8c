"""Data module for pretraining that packs text into windows of tokens."""

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from platformdirs import user_cache_path

from lit_gpt_scratch.data.base_datamodule import BaseDataModule, SplitCounts, reject_null, require_positive_ints
from lit_gpt_scratch.data.packed_dataset import PackedDataset
from lit_gpt_scratch.data.packing import (
    PACKING_POLICIES,
    ConcatenatedPlan,
    PackingPlan,
    PackingPolicy,
    plan_packing,
)
from lit_gpt_scratch.data.prepare_tokens import DEFAULT_KIND, TokenPreparation, default_tokenizer
from lit_gpt_scratch.data.size_stages import Stages, validate_stages
from lit_gpt_scratch.data.token_store import TokenStore, concatenate_stores
from lit_gpt_scratch.diagnostics.config_rules import MIN_VALIDATION_TOKENS
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.text.cleaning import CleaningStep
from lit_gpt_scratch.text.cleaning_report import format_report, read_remarks
from lit_gpt_scratch.text.corpus import CorpusSpec
from lit_gpt_scratch.text.decontamination import Leakage as Leakage  # imported so that configs can refer to it
from lit_gpt_scratch.text.document import first_words
from lit_gpt_scratch.text.duplicates import ExactDuplicates
from lit_gpt_scratch.text.quality import C4 as C4
from lit_gpt_scratch.text.quality import GopherQuality as GopherQuality
from lit_gpt_scratch.text.quality import GopherRepetition as GopherRepetition
from lit_gpt_scratch.text.sources import STDLIB, DocumentSource, UnreadablePolicy
from lit_gpt_scratch.text.text_bytes import LabelByteCounter
from lit_gpt_scratch.text.token_shards import TokenIds
from lit_gpt_scratch.text.tokenizer import Tokenizer

EXAMPLE_TOKENS = 40
"""Number of validation tokens from which the words of ``example_text`` are taken."""
N_SAMPLE_PROMPTS, SAMPLE_PROMPT_TOKENS, SAMPLE_SEARCH_TOKENS = 2, 12, 1_000_000
"""Number of validation documents whose first tokens are used as sample prompts, number of tokens per prompt, and
maximum number of validation tokens that are searched for document starts."""
STDLIB_PROMPT = "def "


VALIDATION_SHARE: Final = 0.05


class PackedText(BaseDataModule):
    """Data module that cleans, splits and tokenizes documents, and packs them into windows of tokens.

    Args:
        source: Text to train on: ``stdlib`` (the default), the standard library of this Python installation; a text,
            JSONL, CSV, TSV, Parquet or Arrow file, optionally compressed; a folder of such files, or a glob
            pattern; or a Hub dataset, as ``owner/name``. To combine several sources, pass a mapping from source to
            weight; the number of bytes used from each source is proportional to its weight.
        text_column: Column that contains the text, if the source has columns.
        config: Configuration name of a Hub dataset.
        split: Split of a Hub dataset to read.
        streaming: Whether to stream a Hub dataset instead of downloading it.
        unreadable: How to handle unreadable files, folders and broken links inside a source folder: ``error`` raises an
            error; ``skip`` skips them and lists them in the cleaning report.
        max_bytes: Maximum number of bytes of text to read from each source; reading stops after the document that
            reaches this limit. By default, all text is read.
        cleaning: Steps that filter or edit documents, applied in order. By default, only exact duplicates are
            removed. See ``text.cleaning``, ``text.quality``, ``text.duplicates`` and ``text.decontamination``.
        processes: Number of processes that clean and tokenize a large corpus. By default, one per core in this
            package's commands, and 1 in other scripts, because each new process imports the main script, which may lack
            an ``if __name__ == "__main__"`` guard. The result does not depend on the number of processes.
        validation_share: Approximate fraction of the text held out for validation, by default 0.05. Near-duplicates are
            kept together. If there is only one document, it is split, and its last part is held out.
        tokenizer: Type of tokenizer to train on the training documents: ``bpe`` (the default), ``wordpiece``,
            ``unigram``, ``char`` or ``byte``; or the path of an existing tokenizer: a ``tokenizer.json`` file, a folder
            that contains such a file, or a folder with GPT-2's ``encoder.json`` and ``vocab.bpe``.
        vocab_size: Vocabulary size of a trained tokenizer, including special tokens. By default 1,024, or less if the
            text yields fewer tokens.
        special_tokens: Special tokens in addition to end-of-text, such as chat roles. Text in documents is never
            encoded as a special token.
        store: Folder for the token store, which contains the tokens, the cleaned text and the cleaning report.
        cache: Folder for packing plans and, if ``store`` is not set, for token stores and cleaned text. By default, a
            folder in the user's cache directory.
        init_from: Checkpoint of a trained model whose tokenizer is used. ``fit`` sets this to ``model.init_from``.
        mixture: Token stores to use instead of ``source``; a token store is a folder that ``prepare`` or ``fit`` has
            written with ``--data.store``. Pass a single folder; a list of folders, in which case an epoch uses every
            window of each store once; or a mapping from folder to weight, in which case the number of training windows
            from each store is proportional to its weight. Validation uses the validation tokens of all stores.
        packing: How to pack documents into windows: ``concatenate``, ``best_fit`` or ``one_document``; see
            ``data.packing``. Validation always uses ``concatenate``, so that every packing policy is scored on the
            same tokens.
        document_mask: Whether tokens attend only to tokens of the same document, with positions counted from the first
            token of the document.
        block_size: Number of tokens per window.
        batch_size: Number of windows per micro-batch on each data-parallel rank.
        tokens_per_step: Number of tokens per optimizer step across all ranks; gradients are accumulated over
            micro-batches to reach this number. By default, ``trainer.accumulate_grad_batches`` sets the number of
            micro-batches per step.
        block_size_stages: Shorter windows at the start of the run (sequence length warmup): end of each stage as a
            fraction of the run's tokens, and its window length, as in ``[[0.2, 64], [0.5, 128]]``. Each window of
            ``block_size`` tokens is split into windows of this length, so that the tokens of a step stay the same.
            Each length must divide the next one, and the last one ``block_size``. Validation uses ``block_size``.
        tokens_per_step_stages: Smaller steps at the start of the run (batch size warmup): end of each stage as a
            fraction of the run's tokens, and its number of tokens per step, as in ``[[0.1, 8192], [0.3, 16384]]``.
            Each number must divide the next one, and the last one ``tokens_per_step``.
        num_workers: Number of DataLoader worker processes; 0 loads batches in the training process, which has little
            overhead because tokens are memory-mapped.
        seed: Seed for the window order; by default, the value of ``seed_everything``.

    Raises:
        UserError: An argument is out of range, or arguments conflict.
    """

    train_dataset: PackedDataset
    validation_dataset: PackedDataset
    item_name = "document"
    next_command = "generate {} --prompt {text}"
    packing: PackingPolicy

    @classmethod
    def default_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values used for arguments that are ``None``; ``fit`` saves these values in ``config.yaml``.

        The signature does not contain these values; if it did, a different class selected with ``--data`` would inherit
        them for all arguments with the same name.
        """
        if arguments.get("mixture") is not None:
            return {}
        return {"source": STDLIB, "validation_share": VALIDATION_SHARE, **default_tokenizer(arguments)}

    def __init__(
        self,
        source: str | dict[str, float] | None = None,
        text_column: str = "text",
        config: str | None = None,
        split: str = "train",
        streaming: bool = False,
        unreadable: UnreadablePolicy = "error",
        max_bytes: int | None = None,
        cleaning: Sequence[CleaningStep] = (ExactDuplicates(),),
        processes: int | None = None,
        validation_share: float | None = None,
        tokenizer: str | None = None,
        vocab_size: int | None = None,
        special_tokens: Sequence[str] = (),
        store: str | None = None,
        cache: str | None = None,
        init_from: str | None = None,
        mixture: str | Sequence[str] | dict[str, float] | None = None,
        packing: PackingPolicy = "concatenate",
        document_mask: bool = False,
        block_size: int = 256,
        batch_size: int = 8,
        tokens_per_step: int | None = None,
        block_size_stages: Stages | None = None,
        tokens_per_step_stages: Stages | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        arguments: dict[str, Any] = dict(locals())
        super().__init__(block_size, batch_size, tokens_per_step, num_workers, seed)
        reject_null({"text_column": text_column, "split": split, "cleaning": cleaning})
        reject_null({"special_tokens": special_tokens})
        source = STDLIB if source is None else source
        validation_share = VALIDATION_SHARE if validation_share is None else validation_share
        require_positive_ints({"vocab_size": vocab_size, "processes": processes})
        if packing not in PACKING_POLICIES:
            raise UserError(f"data.packing is {packing}; it must be one of {', '.join(PACKING_POLICIES)}")
        if block_size_stages is not None:
            validate_stages("block_size", block_size_stages, block_size)
        if tokens_per_step_stages is not None:
            if tokens_per_step is None:
                raise UserError("data.tokens_per_step_stages requires data.tokens_per_step, the size after the stages")
            validate_stages("tokens_per_step", tokens_per_step_stages, tokens_per_step)
        self.block_size_stages, self.tokens_per_step_stages = block_size_stages, tokens_per_step_stages
        if max_bytes is not None and max_bytes < 1:
            raise UserError(f"data.max_bytes is {max_bytes}; it must be positive")
        if not 0.0 < validation_share < 1.0:
            raise UserError(f"data.validation_share is {validation_share}; it must be between 0 and 1")
        weights = source if isinstance(source, dict) else {source: 1.0}
        for name, weight in weights.items():
            if not 0.0 < weight < float("inf"):
                raise UserError(f"data.source: the weight of {name} is {weight}; it must be positive and finite")
        if not weights:
            raise UserError("data.source is empty; set it to at least one source")
        sources = tuple(
            (DocumentSource(name, text_column, config, split, streaming, unreadable), weight)
            for name, weight in weights.items()
        )
        # torch.get_num_threads() is the number of cores that this process may use. A new process imports the main
        # module again. Our commands support this, as modules and as ``lit-gpt``, but a user's script may not.
        main = sys.modules["__main__"]
        is_command = getattr(main, "__spec__", None) is not None or Path(sys.argv[0]).stem == "lit-gpt"
        cores = processes or (torch.get_num_threads() if is_command else 1)
        selection = CorpusSpec(sources, tuple(cleaning), validation_share, max_bytes, cores)
        self.preparation = TokenPreparation(selection, vocab_size, tokenizer or DEFAULT_KIND, tuple(special_tokens))
        self.init_from = init_from
        self._requested = {"tokenizer": tokenizer, "vocab_size": vocab_size}
        self.packing = packing
        self.document_mask = document_mask
        self.cache = Path(cache).expanduser() if cache else user_cache_path("lit_gpt_scratch")
        self.store_folder = Path(store).expanduser().resolve() if store else None
        folders = [mixture] if isinstance(mixture, str) else mixture or ()
        self.mixture_folders = [Path(folder).expanduser() for folder in folders]
        if mixture is not None:
            self.weights = list(mixture.values()) if isinstance(mixture, dict) else None
            validate_mixture(self.mixture_folders, self.weights)
            reject_text_arguments(PackedText, arguments)

    @property
    def origin(self) -> str:
        """Source of the tokens, as specified by the user."""
        return ", ".join(map(str, self.mixture_folders)) or self.preparation.selection.name

    @cached_property
    def stores(self) -> list[TokenStore]:
        """Token stores of the mixture or, without a mixture, of the corpus, which is prepared on first use."""
        if self.mixture_folders:
            return [TokenStore.open(folder) for folder in self.mixture_folders]
        if self.init_from is not None:
            for name, value in self._requested.items():
                if value is not None:
                    raise UserError(f"model.init_from already provides the tokenizer; omit data.{name}")
        return [self.preparation.prepare(self.cache, self.store_folder, self.load_initial_tokenizer())]

    @cached_property
    def store(self) -> TokenStore:
        """Token store that concatenates all stores."""
        return concatenate_stores(self.stores)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer that produced the tokens, with the ``PublishedSettings`` of the ``init_from`` model, if any."""
        tokenizer, initial = self.store.tokenizer, self.load_initial_tokenizer()
        if initial is None or initial.published is None:
            return tokenizer
        return Tokenizer.from_json(tokenizer.to_json(), published=initial.published)

    @property
    def vocab_size(self) -> int:
        """Vocabulary size, read from the token store's manifest instead of the tokenizer file."""
        return self.store.vocab_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the token ids."""
        return self.store.fingerprint

    @property
    def hub_datasets(self) -> tuple[str, ...]:
        """Names of the Hub datasets from which the token stores were prepared."""
        return self.store.hub_datasets

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of sample prompts: a short prompt, and the first tokens of some validation documents.

        The short prompt is ``STDLIB_PROMPT`` for the standard library, and only the start-of-text token for other
        sources.
        """
        stream, start = self.store.validation, self.tokenizer.start_of_text
        length = min(SAMPLE_PROMPT_TOKENS, self.block_size // 2)
        found = [
            stream.read(at, at + length)
            for at in stream.document_starts(0, SAMPLE_SEARCH_TOKENS)[:N_SAMPLE_PROMPTS].tolist()
        ]
        short = self.tokenizer.encode(STDLIB_PROMPT) if self.origin == STDLIB else []
        return [[start, *short], *([start, *ids[ids != self.tokenizer.end_of_text].tolist()] for ids in found)]

    @property
    def split_counts(self) -> dict[str, SplitCounts]:
        """Number of documents, tokens and bytes for training and validation."""
        streams = {"train": self.store.train, "validation": self.store.validation}
        return {
            split: SplitCounts(stream.n_documents, stream.n_tokens, stream.n_bytes) for split, stream in streams.items()
        }

    @property
    def cleaning_reports(self) -> list[str]:
        """Cleaning report of each token store that has an ``audit.json``.

        The report is formatted from ``audit.json``, because the ``audit.md`` of a copied store cannot be trusted.
        """
        found = []
        for path in (store.folder / "audit.json" for store in self.stores):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, or not written by us
                found.append(format_report(read_json(path, dict[str, Any])))
        return found

    def validation_warnings(self) -> Iterator[str]:
        """Yield the remarks in the cleaning reports, and a warning if the validation text is short."""
        for store in self.stores:
            yield from read_remarks(store.folder)
        n_tokens = self.store.validation.n_tokens
        if n_tokens < self.block_size:
            yield (
                f"the validation text has {n_tokens:,} tokens, fewer than one window of {self.block_size}: validation "
                f"metrics are mostly noise; use more text, or raise --data.validation_share"
            )
        elif n_tokens < MIN_VALIDATION_TOKENS:
            yield (
                f"the validation text has only {n_tokens:,} tokens: differences of a few percent are noise; use more "
                f"text, or raise --data.validation_share"
            )

    def prepare_data(self) -> None:
        """Tokenize the corpus, unless its token store already exists."""
        _ = self.store

    def setup(self, stage: str) -> None:
        """Build the datasets and set the number of micro-batches per step.

        Raises:
            UserError: The corpus is too small, or ``tokens_per_step`` does not match the batch size.
        """
        train = [plan_packing(store.train, self.block_size, self.packing, self.cache) for store in self.stores]
        self.train_dataset = self._windows(train)
        token_bytes = np.array(self.token_bytes, dtype=np.int64)
        self.validation_dataset = self._windows(
            [ConcatenatedPlan(store.validation, self.block_size, keep_last=True) for store in self.stores],
            [LabelByteCounter(store.validation, token_bytes).count for store in self.stores],
        )
        for store, part in zip(self.stores, train, strict=True):
            if not len(part):
                raise UserError(
                    f"{store.folder if self.mixture_folders else self.origin} has {store.train.n_tokens} training "
                    f"tokens, fewer than one window of {self.block_size}; add text, or lower --data.block_size"
                )
        batch = self.batch_size * self.shard["num_replicas"]
        if stage == "fit" and len(self.train_dataset) < batch:
            raise UserError(
                f"{self.origin} has {len(self.train_dataset)} training windows of {self.block_size} tokens, "
                f"fewer than one batch of {batch}; add text, or lower --data.batch_size or "
                f"--data.block_size (for example to {max(1, self.block_size * len(self.train_dataset) // (2 * batch))})"
            )
        if not len(self.validation_dataset):
            raise UserError(f"{self.origin} has no tokens for validation; add text, or raise --data.validation_share")
        if stage == "fit":
            self.set_gradient_accumulation()
            self.require_steps_in_stages()

    def sample_train_tokens(self, n: int) -> TokenIds:
        """Return about ``n`` training tokens: the first tokens of each store, in proportion to its weight."""
        whole = [float(store.train.n_tokens) for store in self.stores]
        weights = self.weights or whole
        shares = [n * weight / sum(weights) for weight in weights]
        return np.concatenate(
            [store.train.read(0, math.ceil(share)) for store, share in zip(self.stores, shares, strict=True)]
        )

    def validation_text(self, rows: int | None = None) -> tuple[TokenIds, int]:
        """Return the validation tokens of all stores, and the number of UTF-8 bytes that they represent.

        Args:
            rows: Number of validation windows to read, from the start; None reads all tokens. Unless all are read, the
                byte count excludes the first token of each store, which is never predicted.
        """
        if rows is None or rows >= len(self.validation_dataset):
            return self.store.validation.read(0, self.store.validation.n_tokens), self.store.validation.n_bytes
        read, n_bytes = [], 0
        counters = self.validation_dataset.count_bytes or ()
        for store, part, count_bytes in zip(self.stores, self.validation_dataset.parts, counters, strict=True):
            stream, taken = store.validation, min(rows, len(part))
            rows -= taken
            length = min(taken * self.block_size, stream.n_tokens)
            read.append(stream.read(0, min(length + 1, stream.n_tokens)))
            n_bytes += count_bytes(0, length)
            if not rows:
                break
        return np.concatenate(read), n_bytes

    @property
    def example_text(self) -> str:
        """First words of the validation text."""
        ids = self.store.validation.read(0, EXAMPLE_TOKENS)
        return first_words(self.tokenizer.decode(ids[ids != self.tokenizer.end_of_text].tolist()))

    def _windows(
        self, parts: Sequence[PackingPlan], count_bytes: Sequence[Callable[[int, int], int]] | None = None
    ) -> PackedDataset:
        end_of_text = self.tokenizer.end_of_text
        return PackedDataset(parts, self.block_size, self.vocab_size, end_of_text, self.document_mask, count_bytes)


TEXT_ARGUMENTS: Final = (
    "source", "text_column", "config", "split", "streaming", "unreadable", "max_bytes", "cleaning",
    "validation_share", "tokenizer", "vocab_size", "special_tokens", "store",
)  # fmt: skip
"""Arguments that determine the tokens, and therefore have no effect with ``mixture``."""


def validate_mixture(folders: Sequence[Path], weights: Sequence[float] | None) -> None:
    """Validate the stores and weights of a mixture.

    Raises:
        UserError: There is no store, or a weight is out of range.
    """
    if not folders:
        raise UserError("data.mixture is empty; set it to at least one token store")
    for folder, weight in zip(folders, weights or [1.0] * len(folders), strict=True):
        if not 0.0 <= weight < math.inf:
            raise UserError(f"data.mixture: the weight of {folder} is {weight}; it must be finite and 0 or more")
    if weights is not None and not 0 < sum(weights) < math.inf:
        raise UserError(f"data.mixture: the weights sum to {sum(weights):g}; the sum must be positive and finite")


def reject_text_arguments(kind: type, arguments: Mapping[str, Any]) -> None:
    """Reject arguments that have no effect because the tokens already exist.

    Args:
        kind: The data module class, whose signature contains the defaults.
        arguments: The arguments passed to the class.

    Raises:
        UserError: One of ``TEXT_ARGUMENTS`` differs from its default.
    """
    for name in TEXT_ARGUMENTS:
        default = inspect.signature(kind).parameters[name].default
        given = tuple(arguments[name]) if isinstance(arguments[name], list) else arguments[name]
        if given != default:
            raise UserError(f"data.mixture uses existing tokens, so data.{name} has no effect; omit it")
