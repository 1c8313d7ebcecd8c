"""Text as packed windows of tokens: the data of pretraining."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import lightning as L
import torch
from platformdirs import user_cache_path
from torch.utils.data import DataLoader

from lit_gpt_scratch.batch import Batch
from lit_gpt_scratch.data.packing import Windows
from lit_gpt_scratch.data.recipe import Recipe
from lit_gpt_scratch.data.sampler import EveryWindow, WindowOrder
from lit_gpt_scratch.data.token_store import TokenStore
from lit_gpt_scratch.data.workers import leave_stopping_to_the_trainer
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.cleaning import Step
from lit_gpt_scratch.text.corpus import Selection
from lit_gpt_scratch.text.duplicates import ExactDuplicates
from lit_gpt_scratch.text.leakage import Leakage as Leakage  # a config may name it
from lit_gpt_scratch.text.quality import C4 as C4
from lit_gpt_scratch.text.quality import GopherQuality as GopherQuality
from lit_gpt_scratch.text.quality import GopherRepetition as GopherRepetition
from lit_gpt_scratch.text.sources import STDLIB, Source
from lit_gpt_scratch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LARGEST: Final = 2**30
"""No size comes near it; some libraries end the process when asked for more than there can be."""


class PackedText(L.LightningDataModule):
    """Documents, split, tokenised and packed into windows.

    Args:
        source: ``stdlib`` (this Python's own standard library); a text file, a folder, or a pattern with ``*``; JSONL,
            CSV, TSV, Parquet or Arrow, compressed or not; ``owner/name`` of a dataset of the Hub. Or several of these,
            each with a weight: so much of each is taken that their bytes are as the weights.
        text_column: The column with the text, where there are columns.
        config: The configuration of a dataset of the Hub.
        split: The split of a dataset of the Hub.
        streaming: Read a dataset of the Hub as it comes, without keeping a copy.
        max_bytes: Read no further, in each source, than the document that reaches so many bytes of text.
        cleaning: Steps from documents to fewer or cleaner ones, in their order; by default exact duplicates are
            dropped. See ``text.cleaning``, ``text.quality``, ``text.duplicates`` and ``text.leakage``.
        processes: To clean a large corpus in; by default as many as there are cores, and one in a script that new
            processes would run again. They change no byte.
        validation_share: Share of the documents that is held out; of a single document, the share of its end.
        tokenizer: The kind to train on the training documents: ``bpe``, ``wordpiece``, ``unigram``, ``char`` or
            ``byte``. Or one to use: a ``tokenizer.json``, or a folder with one, or with GPT-2's ``encoder.json`` and
            ``vocab.bpe``.
        vocab_size: Tokens of the tokenizer that is trained, special ones included; by default 1,024, or as many as
            the text gives.
        special_tokens: Tokens that no text is made into, beside the end of text, as for the roles of a chat.
        store: Folder for the tokens of this text alone, with the text as it was cleaned, and its audit.
        cache: Folder for all others, and their texts; by default one in the user's cache folder.
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

    def __init__(
        self,
        source: str | dict[str, float] = STDLIB,
        text_column: str = "text",
        config: str | None = None,
        split: str = "train",
        streaming: bool = False,
        max_bytes: int | None = None,
        cleaning: Sequence[Step] = (ExactDuplicates(),),
        processes: int | None = None,
        validation_share: float = 0.05,
        tokenizer: str = "bpe",
        vocab_size: int | None = None,
        special_tokens: Sequence[str] = (),
        store: str | None = None,
        cache: str | None = None,
        block_size: int = 256,
        batch_size: int = 8,
        tokens_per_step: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        needed: dict[str, Any] = {"source": source, "text_column": text_column, "split": split, "cleaning": cleaning}
        needed |= {"tokenizer": tokenizer, "special_tokens": special_tokens, "validation_share": validation_share}
        needed |= {"block_size": block_size, "batch_size": batch_size, "num_workers": num_workers}
        for name, given in needed.items():
            if given is None:  # the command line lets null pass as any type
                raise UserError(f"data.{name} is null; leave it out for its default")
        positive = {"vocab_size": vocab_size, "block_size": block_size, "batch_size": batch_size}
        positive |= {"tokens_per_step": tokens_per_step, "processes": processes}
        for name, value in positive.items():
            if value is not None and not 1 <= value < LARGEST:
                raise UserError(f"data.{name} is {value}; it must be positive, and below {LARGEST:,}")
        if max_bytes is not None and max_bytes < 1:
            raise UserError(f"data.max_bytes is {max_bytes}; it must be positive")
        if num_workers < 0:
            raise UserError(f"data.num_workers is {num_workers}; it must be 0 or more")
        if not 0.0 < validation_share < 1.0:
            raise UserError(f"data.validation_share is {validation_share}; it must lie between 0 and 1")
        weights = source if isinstance(source, dict) else {source: 1.0}
        for name, weight in weights.items():
            if not 0.0 < weight < float("inf"):
                raise UserError(f"data.source: the weight of {name} is {weight}; it must be positive")
        if not weights:
            raise UserError("data.source has no source in it; name one")
        sources = tuple(
            (Source(name, text_column, config, split, streaming), weight) for name, weight in weights.items()
        )
        # Torch's threads are what this machine, or this process' share of it, has cores for. A new process imports the
        # main module: a door, run by its module's name, is made for that; a script may not be.
        runs_a_module = getattr(sys.modules["__main__"], "__spec__", None) is not None
        cores = processes or (torch.get_num_threads() if runs_a_module else 1)
        selection = Selection(sources, tuple(cleaning), validation_share, max_bytes, cores)
        self.recipe = Recipe(selection, vocab_size, tokenizer, tuple(special_tokens))
        self.block_size = block_size
        self.batch_size = batch_size
        self.tokens_per_step = tokens_per_step
        self.num_workers = num_workers
        self.cache = Path(cache).expanduser() if cache else user_cache_path("lit_gpt_scratch")
        self.kept_in = Path(store).expanduser().resolve() if store else None
        self.seed = seed
        self._store: TokenStore | None = None

    @property
    def store(self) -> TokenStore:
        """The prepared corpus, made on first use."""
        if self._store is None:
            self._store = self.recipe.prepare(self.cache, self.kept_in)
        return self._store

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return self.store.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids, as trained: it can be below what was asked for on a short text."""
        return self.tokenizer.vocab_size

    @property
    def token_bytes(self) -> list[int]:
        """Bytes of text that each token id stands for."""
        return self.tokenizer.token_bytes()

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as the text of its file; checkpoints embed it."""
        return self.tokenizer.to_json()

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of a micro-batch over all ranks."""
        return self.batch_size * self._shard()["num_replicas"] * self.block_size

    def prepare_data(self) -> None:
        """Tokenise the corpus unless a store of it exists."""
        _ = self.store

    def setup(self, stage: str) -> None:
        """Cut the windows, and settle how many micro-batches make a step.

        Raises:
            UserError: The corpus is too small, or ``tokens_per_step`` cannot be reached.
        """
        store, name = self.store, self.recipe.selection.name
        self.train_windows = Windows(store.train, self.block_size)
        self.validation_windows = Windows(store.validation, self.block_size, whole=True)
        if not len(self.train_windows):
            raise UserError(
                f"{name} has {store.train.n_tokens} tokens for training, fewer than one window of {self.block_size}; "
                "name more text, or lower --data.block_size"
            )
        batch = self.batch_size * self._shard()["num_replicas"]
        if len(self.train_windows) < batch:
            raise UserError(
                f"{name} has {len(self.train_windows)} windows of {self.block_size} tokens for "
                f"training, fewer than one batch of {batch}; name more text, or lower --data.batch_size or "
                f"--data.block_size (to {max(1, self.block_size * len(self.train_windows) // (2 * batch))}, say)"
            )
        if not len(self.validation_windows):
            raise UserError(f"{name} leaves nothing to validate on; name more text, or raise --data.validation_share")
        if stage == "fit" and self.tokens_per_step is not None:
            self._accumulate(self.tokens_per_step, self.tokens_per_batch)

    def _accumulate(self, tokens_per_step: int, tokens_per_batch: int) -> None:
        if tokens_per_step % tokens_per_batch:
            raise UserError(
                f"data.tokens_per_step ({tokens_per_step}) is not a multiple of the {tokens_per_batch} tokens of a "
                f"micro-batch (block_size x batch_size x ranks)"
            )
        batches = tokens_per_step // tokens_per_batch
        if self.trainer is None:
            return
        if self.trainer.accumulate_grad_batches not in (1, batches):
            raise UserError(
                f"data.tokens_per_step asks for {batches} micro-batches a step, trainer.accumulate_grad_batches for "
                f"{self.trainer.accumulate_grad_batches}; give only one of them"
            )
        self.trainer.accumulate_grad_batches = batches

    def _shard(self) -> dict[str, int]:
        """Which part of the data is this process's; ranks of a tensor-parallel group share theirs."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return {"num_replicas": 1, "rank": 0, **(kwargs or {})}

    def _position(self) -> tuple[int, int]:
        """The epoch and the step in it that come next: a resumed trainer knows before it asks for the loader.

        Batches of an unfinished epoch that were delivered are not delivered again. An epoch whose last batch
        was delivered rolls over, whether the trainer had counted it when it was saved or not.
        """
        if self.trainer is None:
            return 0, 0
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current  # its type is declared on a base class without these counts
        if epochs.started == epochs.processed:
            return epochs.processed, 0
        batches = loop.epoch_loop.batch_progress
        return (epochs.processed + 1, 0) if batches.is_last_batch else (epochs.processed, batches.current.ready)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches in the order of ``WindowOrder``, from where the trainer stands."""
        shard = self._shard()
        order = WindowOrder(
            n_windows=len(self.train_windows),
            batch_size=self.batch_size,
            seed=self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0)),
            rank=shard["rank"],
            world_size=shard["num_replicas"],
            start=self._position(),
        )
        return self._loader(self.train_windows, order)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation window once."""
        shard = self._shard()
        order = EveryWindow(len(self.validation_windows), self.batch_size, shard["rank"], shard["num_replicas"])
        return self._loader(self.validation_windows, order)

    def _loader(self, windows: Windows, order: WindowOrder | EveryWindow) -> DataLoader[Batch]:
        return DataLoader(
            windows,
            batch_size=self.batch_size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=leave_stopping_to_the_trainer,
        )


def _as_is(batch: Any) -> Any:
    """``Windows`` makes whole batches: nothing is left to collate."""
    return batch
