"""What every DataModule has in common: batches of windows, in an order that is known, from where the trainer stands.

A window is what takes a row of a batch: packed documents, or one record that is filled up.
"""

import atexit
import multiprocessing
import os
import signal
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Final, Protocol, cast

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lit_gpt_scratch.batch_types import BatchLayout
from lit_gpt_scratch.data.packed_dataset import PackedDataset
from lit_gpt_scratch.data.sampler import EvaluationSampler, ShuffledOrder, ShuffledSampler
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.tokenizer import Tokenizer

LARGEST: Final = 2**30
"""No size comes near it; some libraries end the process when asked for more than there can be."""


class RowDataset(Protocol):
    """What a loader reads: windows, counted through; an index behind the last stands for one without labels."""

    @property
    def sizes(self) -> list[int]:
        """Windows of each part."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """A whole batch at once: the hook that ``DataLoader`` calls when a dataset has it."""


class BaseDataModule(L.LightningDataModule):
    """Windows, dealt out. Subclasses set ``train_dataset`` and the like in ``setup``, and have a ``tokenizer``.

    Args:
        block_size: Tokens in a window.
        batch_size: Windows per data-parallel rank and micro-batch.
        tokens_per_step: Tokens per optimizer step over all ranks, or None for a micro-batch.
        num_workers: Processes that load batches beside the training.
        seed: Seed of the order, or None for that of ``seed_everything``.

    Raises:
        UserError: A number is out of range.
    """

    train_dataset: RowDataset
    validation_dataset: RowDataset
    test_dataset: RowDataset | None = None
    """None where nothing is held out for a test."""
    weights: Sequence[float] | None = None
    """Of each part of ``train_dataset``; None for as many windows as each has."""

    def __init__(
        self, block_size: int, batch_size: int, tokens_per_step: int | None, num_workers: int, seed: int | None
    ) -> None:
        super().__init__()
        reject_null({"block_size": block_size, "batch_size": batch_size, "num_workers": num_workers})
        require_positive_ints({"block_size": block_size, "batch_size": batch_size, "tokens_per_step": tokens_per_step})
        for name, value in (("num_workers", num_workers), ("seed", seed or 0)):
            if value < 0:
                raise UserError(f"data.{name} is {value}; it must be 0 or more")
        self.block_size = block_size
        self.batch_size = batch_size
        self.tokens_per_step = tokens_per_step
        self.num_workers = num_workers
        self.seed = seed

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """What makes the tokens."""

    @property
    def origin(self) -> str:
        """What it is made of, as a user wrote it."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """A hash of all that a run learns from and is measured on."""
        raise NotImplementedError

    @property
    def prompts(self) -> list[list[int]]:
        """Ids of what a language model is asked to go on with, for samples that show what it has learned."""
        return [[self.tokenizer.start_of_text]]

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
        return self.batch_size * self.shard["num_replicas"] * self.block_size

    @property
    def shard(self) -> dict[str, int]:
        """Which part of the data is this process's; ranks of a tensor-parallel group share theirs."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return {"num_replicas": 1, "rank": 0, **(kwargs or {})}

    @property
    def layout(self) -> BatchLayout:
        """How a step is dealt out, once the trainer's accumulation is settled."""
        accumulate = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        return BatchLayout(self.batch_size, self.shard["num_replicas"], accumulate)

    @property
    def order(self) -> ShuffledSampler:
        """The training order of this process, from where the trainer stands."""
        seed = self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))
        shuffle = ShuffledOrder(self.train_dataset.sizes, seed, self.weights)
        batch_size, replicas, accumulate = self.layout
        return ShuffledSampler(shuffle, batch_size, self.shard["rank"], replicas, self._position(), accumulate)

    def describe_row(self, epoch: int, batch: int, place: int) -> str:
        """What was dealt out at a place of this process's batch, in words: documents or a record, counted from 0."""
        window = int(self.order.batches(epoch, np.array([batch]))[0, place])
        windows = self.train_dataset
        return windows.describe_documents(window) if isinstance(windows, PackedDataset) else f"record {window:,}"

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in their order."""
        return self._loader(self.train_dataset, self.order)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation window once."""
        return self._every(self.validation_dataset)

    def test_dataloader(self) -> DataLoader[Any]:
        """Every test window once.

        Raises:
            UserError: Nothing is held out for a test.
        """
        if self.test_dataset is None:
            raise UserError(f"{type(self).__name__} holds nothing out for a test")
        return self._every(self.test_dataset)

    def accumulate(self) -> None:
        """Settle how many micro-batches make a step.

        Raises:
            UserError: ``tokens_per_step`` cannot be reached, or contradicts the trainer.
        """
        if self.tokens_per_step is None:
            return
        if self.tokens_per_step % self.tokens_per_batch:
            raise UserError(
                f"data.tokens_per_step ({self.tokens_per_step}) is not a multiple of the {self.tokens_per_batch} "
                "tokens of a micro-batch (block_size x batch_size x ranks)"
            )
        batches = self.tokens_per_step // self.tokens_per_batch
        if self.trainer is None:
            return
        if self.trainer.accumulate_grad_batches not in (1, batches):
            raise UserError(
                f"data.tokens_per_step asks for {batches} micro-batches a step, trainer.accumulate_grad_batches for "
                f"{self.trainer.accumulate_grad_batches}; give only one of them"
            )
        self.trainer.accumulate_grad_batches = batches

    def _position(self) -> tuple[int, int]:
        """The epoch and the micro-batch in it that come next: a resumed trainer knows before it asks for the loader.

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

    def _every(self, windows: RowDataset) -> DataLoader[Any]:
        shard = self.shard
        order = EvaluationSampler(len(windows), self.batch_size, shard["rank"], shard["num_replicas"])
        return self._loader(windows, order)

    def _loader(self, windows: RowDataset, order: ShuffledSampler | EvaluationSampler) -> DataLoader[Any]:
        return DataLoader(
            cast("Dataset[Any]", windows),
            batch_size=self.batch_size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_stop_signals,
        )


def reject_null(given: dict[str, Any]) -> None:
    """The command line lets null pass as any type."""
    for name, value in given.items():
        if value is None:
            raise UserError(f"data.{name} is null; leave it out for its default")


def require_positive_ints(given: dict[str, int | None]) -> None:
    """Numbers that must be, where they are given at all."""
    for name, value in given.items():
        if value is not None and not 1 <= value < LARGEST:
            raise UserError(f"data.{name} is {value}; it must be positive, and below {LARGEST:,}")


def _as_is(batch: Any) -> Any:
    """An arrangement makes whole batches: nothing is left to collate."""
    return batch


STOP_SIGNALS: Final = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Ctrl-C, what a system sends before it kills, and what SLURM sends before a time limit (sbatch --signal=USR1@60)."""


def ignore_stop_signals(worker: int) -> None:
    """Ignore what asks a run to stop: a terminal and SLURM ask all its processes, and the step needs its batch.

    A worker ends when the trainer closes its loader, or is gone.
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """End workers whose loader nobody closed, as after an error.

    At exit ``multiprocessing`` sends its daemons SIGTERM and waits for them; these would not hear it. This runs
    before: what was registered last is called first.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes a killed worker for an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
