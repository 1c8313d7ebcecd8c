"""Text as packed windows of tokens: the data of pretraining."""

import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from platformdirs import user_cache_path

from lit_gpt_scratch.checkpoint.init_from import load_initial_tokenizer
from lit_gpt_scratch.data.base_datamodule import BaseDataModule, reject_null, require_positive_ints
from lit_gpt_scratch.data.packed_dataset import PackedDataset
from lit_gpt_scratch.data.packing import PACKING_POLICIES, ConcatenatedPlan, PackingPlan, PackingPolicy, plan_packing
from lit_gpt_scratch.data.prepare_tokens import TokenPreparation
from lit_gpt_scratch.data.token_store import TokenStore, concatenate_stores
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.cleaning import CleaningStep
from lit_gpt_scratch.text.corpus import CorpusSpec
from lit_gpt_scratch.text.decontamination import Leakage as Leakage  # a config may name it
from lit_gpt_scratch.text.duplicates import ExactDuplicates
from lit_gpt_scratch.text.quality import C4 as C4
from lit_gpt_scratch.text.quality import GopherQuality as GopherQuality
from lit_gpt_scratch.text.quality import GopherRepetition as GopherRepetition
from lit_gpt_scratch.text.sources import STDLIB, DocumentSource
from lit_gpt_scratch.text.token_shards import TokenIds
from lit_gpt_scratch.text.tokenizer import Tokenizer

N_SAMPLE_PROMPTS, SAMPLE_PROMPT_TOKENS, SAMPLE_SEARCH_TOKENS = 2, 12, 1_000_000
"""Documents whose beginnings a model is asked to go on with, tokens of a beginning, and in how many they are sought."""


class PackedText(BaseDataModule):
    """Documents, split, tokenised and packed into windows.

    Args:
        source: ``stdlib`` (this Python's own standard library), the default; a text file, a folder, or a pattern with
            ``*``; JSONL, CSV, TSV, Parquet or Arrow, compressed or not; ``owner/name`` of a dataset of the Hub. Or
            several of these, each with a weight: so much of each is taken that their bytes are as the weights.
        text_column: The column with the text, where there are columns.
        config: The configuration of a dataset of the Hub.
        split: The split of a dataset of the Hub.
        streaming: Read a dataset of the Hub as it comes, without keeping a copy.
        max_bytes: Read no further, in each source, than the document that reaches so many bytes of text.
        cleaning: Steps from documents to fewer or cleaner ones, in their order; by default exact duplicates are
            dropped. See ``text.cleaning``, ``text.quality``, ``text.duplicates`` and ``text.leakage``.
        processes: To clean a large corpus in; by default as many as there are cores, and one in a script that new
            processes would run again. They change no byte.
        validation_share: Share of the documents that is held out, by default 0.05; of a single document, the share of
            its end.
        tokenizer: The kind to train on the training documents: ``bpe``, the default, ``wordpiece``, ``unigram``,
            ``char`` or ``byte``. Or one to use: a ``tokenizer.json``, or a folder with one, or with GPT-2's
            ``encoder.json`` and ``vocab.bpe``.
        vocab_size: Tokens of the tokenizer that is trained, special ones included; by default 1,024, or as many as
            the text gives.
        special_tokens: Tokens that no text is made into, beside the end of text, as for the roles of a chat.
        store: Folder for the tokens of this text alone, with the text as it was cleaned, and its audit.
        cache: Folder for all others, and their texts; by default one in the user's cache folder.
        init_from: A trained model, whose tokenizer is used; ``fit`` says here what ``model.init_from`` is.
        mixture: Folders that were given as ``store`` before, to take tokens from instead of ``source``: one; a list,
            for all windows of each; or each with a weight, for so large a share of the training windows. Validation
            sees all that any of them holds out.
        packing: How documents are laid into windows: ``concatenate``, ``best_fit`` or ``one_document``; see
            ``data.packing``. Validation always concatenates, so that it scores the same tokens whatever the packing.
        document_mask: No token attends to another document, and positions count from a document's first token.
        block_size: Tokens in a window.
        batch_size: Windows per data-parallel rank and micro-batch.
        tokens_per_step: Tokens per optimizer step over all ranks; gradients of several micro-batches are
            accumulated to reach it. By default a step is one micro-batch.
        num_workers: Processes that load batches beside the training; 0 loads in the training process,
            which for memory-mapped tokens costs next to nothing.
        seed: Seed of the order of windows; by default that of ``seed_everything``.

    Raises:
        UserError: A number is out of range.
    """

    train_dataset: PackedDataset
    validation_dataset: PackedDataset

    def __init__(
        self,
        source: str | dict[str, float] | None = None,
        text_column: str = "text",
        config: str | None = None,
        split: str = "train",
        streaming: bool = False,
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
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        arguments: dict[str, Any] = dict(locals())
        super().__init__(block_size, batch_size, tokens_per_step, num_workers, seed)
        reject_null({"text_column": text_column, "split": split, "cleaning": cleaning})
        reject_null({"special_tokens": special_tokens})
        # Defaults that are not those of other data are resolved here: --data keeps what both classes know.
        source = STDLIB if source is None else source
        validation_share = 0.05 if validation_share is None else validation_share
        require_positive_ints({"vocab_size": vocab_size, "processes": processes})
        if packing not in PACKING_POLICIES:
            raise UserError(f"data.packing is {packing}; it must be one of {', '.join(PACKING_POLICIES)}")
        if max_bytes is not None and max_bytes < 1:
            raise UserError(f"data.max_bytes is {max_bytes}; it must be positive")
        if not 0.0 < validation_share < 1.0:
            raise UserError(f"data.validation_share is {validation_share}; it must lie between 0 and 1")
        weights = source if isinstance(source, dict) else {source: 1.0}
        for name, weight in weights.items():
            if not 0.0 < weight < float("inf"):
                raise UserError(f"data.source: the weight of {name} is {weight}; it must be positive")
        if not weights:
            raise UserError("data.source has no source in it; name one")
        sources = tuple(
            (DocumentSource(name, text_column, config, split, streaming), weight) for name, weight in weights.items()
        )
        # Torch's threads are what this machine, or this process' share of it, has cores for. A new process imports the
        # main module: a door, run by its module's name, is made for that; a script may not be.
        runs_a_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
        cores = processes or (torch.get_num_threads() if runs_a_module else 1)
        selection = CorpusSpec(sources, tuple(cleaning), validation_share, max_bytes, cores)
        self.preparation = TokenPreparation(selection, vocab_size, tokenizer or "bpe", tuple(special_tokens))
        self.init_from = init_from
        self._asked = {"tokenizer": tokenizer, "vocab_size": vocab_size}
        self.packing: PackingPolicy = packing
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
        """What the tokens are made of, as a user wrote it."""
        return ", ".join(map(str, self.mixture_folders)) or self.preparation.selection.name

    @cached_property
    def stores(self) -> list[TokenStore]:
        """What the tokens come from: the prepared corpus, made on first use; or those that are mixed."""
        if self.mixture_folders:
            return [TokenStore.open(folder) for folder in self.mixture_folders]
        given = None
        if self.init_from is not None:
            for name, asked in self._asked.items():
                if asked is not None:
                    raise UserError(f"model.init_from brings a tokenizer of its own; leave out data.{name}")
            given = load_initial_tokenizer(self.init_from)
        return [self.preparation.prepare(self.cache, self.store_folder, given)]

    @cached_property
    def store(self) -> TokenStore:
        """All of them as one."""
        return concatenate_stores(self.stores)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return self.store.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids, as the store says without reading its tokenizer."""
        return self.store.vocab_size

    @property
    def fingerprint(self) -> str:
        """Of the tokens."""
        return self.store.fingerprint

    @property
    def prompts(self) -> list[list[int]]:
        """The beginning of a document, and the first tokens of some that are validated on."""
        stream, start = self.store.validation, self.tokenizer.start_of_text
        length = min(SAMPLE_PROMPT_TOKENS, self.block_size // 2)
        found = [
            stream.read(at, at + length)
            for at in stream.document_starts(0, SAMPLE_SEARCH_TOKENS)[:N_SAMPLE_PROMPTS].tolist()
        ]
        return [[start], *([start, *ids[ids != self.tokenizer.end_of_text].tolist()] for ids in found)]

    def prepare_data(self) -> None:
        """Tokenise the corpus unless a store of it exists."""
        _ = self.store

    def setup(self, stage: str) -> None:
        """Lay the windows, and settle how many micro-batches make a step.

        Raises:
            UserError: The corpus is too small, or ``tokens_per_step`` cannot be reached.
        """
        train = [plan_packing(store.train, self.block_size, self.packing, self.cache) for store in self.stores]
        self.train_dataset = self._windows(train)
        self.validation_dataset = self._windows(
            [ConcatenatedPlan(store.validation, self.block_size, keep_last=True) for store in self.stores]
        )
        for store, part in zip(self.stores, train, strict=True):
            if not len(part):
                raise UserError(
                    f"{store.folder if self.mixture_folders else self.origin} has {store.train.n_tokens} tokens "
                    "for training, "
                    f"fewer than one window of {self.block_size}; name more text, or lower --data.block_size"
                )
        batch = self.batch_size * self.shard["num_replicas"]
        if stage == "fit" and len(self.train_dataset) < batch:
            raise UserError(
                f"{self.origin} has {len(self.train_dataset)} windows of {self.block_size} tokens for "
                f"training, fewer than one batch of {batch}; name more text, or lower --data.batch_size or "
                f"--data.block_size (to {max(1, self.block_size * len(self.train_dataset) // (2 * batch))}, say)"
            )
        if not len(self.validation_dataset):
            raise UserError(
                f"{self.origin} leaves nothing to validate on; name more text, or raise --data.validation_share"
            )
        if stage == "fit":
            self.accumulate()

    def sample_train_tokens(self, n: int) -> TokenIds:
        """About the first so many tokens of the training, of each store its share."""
        whole = [float(store.train.n_tokens) for store in self.stores]
        weights = self.weights or whole
        shares = [n * weight / sum(weights) for weight in weights]
        return np.concatenate(
            [store.train.read(0, math.ceil(share)) for store, share in zip(self.stores, shares, strict=True)]
        )

    @property
    def uneven(self) -> bool:
        """Whether some windows of the training have fewer labels than others."""
        return self.packing != "concatenate"

    def _windows(self, parts: Sequence[PackingPlan]) -> PackedDataset:
        end_of_text = self.tokenizer.end_of_text
        return PackedDataset(parts, self.block_size, self.vocab_size, end_of_text, self.document_mask)


TEXT_ARGUMENTS: Final = (
    "source", "text_column", "config", "split", "streaming", "max_bytes", "cleaning", "validation_share", "tokenizer",
    "vocab_size", "special_tokens", "store",
)  # fmt: skip
"""Arguments that mean nothing to tokens that are made already."""


def validate_mixture(folders: Sequence[Path], weights: Sequence[float] | None) -> None:
    """Refuse what cannot be mixed.

    Raises:
        UserError: There is no store, or a weight is out of range.
    """
    if not folders:
        raise UserError("data.mixture has no store in it; name one")
    for folder, weight in zip(folders, weights or [1.0] * len(folders), strict=True):
        if not 0.0 <= weight < math.inf:
            raise UserError(f"data.mixture: the weight of {folder} is {weight}; it must be 0 or more")
    if weights is not None and not 0 < sum(weights) < math.inf:
        raise UserError(f"data.mixture: the weights sum to {sum(weights):g}; give at least one store a weight")


def reject_text_arguments(kind: type, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that say how tokens are made.

    Args:
        kind: The data module, whose signature has the defaults.
        arguments: What it was given.

    Raises:
        UserError: One of them is not its default.
    """
    for name in TEXT_ARGUMENTS:
        default = inspect.signature(kind).parameters[name].default
        given = tuple(arguments[name]) if isinstance(arguments[name], list) else arguments[name]
        if given != default:
            raise UserError(f"data.mixture is of tokens that are made already; leave out data.{name}")
