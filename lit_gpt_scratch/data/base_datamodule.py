"""Base class for all data modules. Batches have a reproducible order, so training can be resumed at any step.

A row is one sequence in a batch: either packed documents or one padded record.
"""

import atexit
import math
import multiprocessing
import signal
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from lit_gpt_scratch.batch_types import BatchLayout, DataInfo
from lit_gpt_scratch.checkpoint.init_from import InitialModel
from lit_gpt_scratch.data.packing import PackingPolicy
from lit_gpt_scratch.data.sampler import (
    EvaluationSampler,
    RowDataset,
    SequentialMicroBatches,
    ShuffledOrder,
    ShuffledSampler,
)
from lit_gpt_scratch.data.size_stages import SizeStages, Stages
from lit_gpt_scratch.distributed.stop_signals import STOP_SIGNALS
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.lightning_compat import global_seed, schedule_accumulation
from lit_gpt_scratch.text.token_shards import TokenIds
from lit_gpt_scratch.text.tokenizer import Tokenizer

MAX_SIZE: Final = 2**30
"""Exclusive upper bound on size arguments such as ``block_size``, far above any useful size. Some libraries abort the
process if a size is larger."""


class SplitCounts(NamedTuple):
    """Size of one split.

    Attributes:
        items: Number of documents or records.
        tokens: Number of tokens, excluding padding.
        n_bytes: Number of UTF-8 bytes of text, or None if not counted.
    """

    items: int
    tokens: int
    n_bytes: int | None = None


class BaseDataModule(L.LightningDataModule):
    """Base class for data modules that batch rows.

    Subclasses implement ``tokenizer``, and set ``train_dataset``, ``validation_dataset`` and, if there is a test split,
    ``test_dataset`` in ``setup``. They can also override the members from ``item_name`` to ``prompts``, which
    callbacks use in reports and logs.

    Args:
        block_size: Tokens per row.
        batch_size: Rows per data-parallel rank and micro-batch.
        tokens_per_step: Tokens per optimizer step across all ranks. None leaves ``trainer.accumulate_grad_batches``
            unchanged.
        num_workers: Number of DataLoader worker processes; 0 loads batches in the training process.
        seed: Seed for the row order. None uses the seed of ``seed_everything``.

    Raises:
        UserError: An argument is null or out of range.
    """

    train_dataset: RowDataset[Any]
    validation_dataset: RowDataset[Any]
    test_dataset: RowDataset[Any] | None = None
    """Test dataset, or None if there is no test split."""
    init_from: str | None = None
    """Checkpoint of the pretrained model that training starts from and whose tokenizer encodes the text, or None if a
    new model is trained."""
    initial_tokenizer: Tokenizer | None = None
    """Tokenizer of the ``init_from`` model, read on first use; can be set in advance if the model is already loaded."""
    weights: Sequence[float] | None = None
    """Sampling weight of each part of ``train_dataset``. If None, an epoch visits every row once."""
    tokens_per_step_stages: Stages | None = None
    """Stages in which the number of tokens per optimizer step grows to ``tokens_per_step``, or None."""
    block_size_stages: Stages | None = None
    """Stages in which the number of tokens per window grows to ``block_size``, or None."""

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
        """Tokenizer that encodes the text."""

    @property
    def origin(self) -> str:
        """Source of the text, as specified by the user."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Hash of all training and evaluation data."""
        raise NotImplementedError

    # Optional overrides, which callbacks use in reports and logs.

    @property
    def hub_datasets(self) -> tuple[str, ...]:
        """Names of the Hub datasets that contain the text, as specified by the user (``owner/name@revision``)."""
        return ()

    item_name: ClassVar[str] = "row"
    """Singular noun for the items that ``SplitCounts.items`` counts, such as "document"."""
    packing: PackingPolicy | None = None
    """Policy for packing documents into rows, or None if each row is one padded record."""
    next_command: ClassVar[str] = "generate {}"
    """Command to suggest after training, in which ``{}`` is the run directory and ``{text}`` is ``example_text``."""

    @property
    def example_text(self) -> str:
        """First words of a validation text for ``next_command``, or an empty string if there is no such text."""
        return ""

    @property
    def split_counts(self) -> Mapping[str, SplitCounts]:
        """Size of each split, keyed by split name."""
        return {}

    @property
    def cleaning_reports(self) -> list[str]:
        """Markdown reports on the documents that the cleaning steps removed, one per token store."""
        return []

    def labelled_texts(self, split: str, rows: int | None = None) -> tuple[list[str], list[int]] | None:
        """Return the texts and class indices of a split, or None if the data has no classes.

        The texts are truncated like the model's input.

        Args:
            split: Name of the split.
            rows: Number of rows to read from the start of the split; None reads all rows.
        """
        return None

    def validation_warnings(self) -> Iterator[str]:
        """Yield a warning for each reason to expect noisy validation metrics."""
        return iter(())

    def sample_train_tokens(self, n: int) -> TokenIds | None:
        """Return about ``n`` tokens of training text, or None if the data is not contiguous text."""
        return None

    def validation_text(self, rows: int | None = None) -> tuple[TokenIds, int] | None:
        """Return the validation tokens and their number of UTF-8 bytes, or None if the data is not contiguous text.

        Args:
            rows: Number of validation rows to read; None reads the whole text.
        """
        return None

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of the prompts for text samples logged during training."""
        return [[self.tokenizer.start_of_text]]

    @property
    def vocab_size(self) -> int:
        """Vocabulary size, which is smaller than the default if the tokenizer was trained on little text."""
        return self.tokenizer.vocab_size

    @property
    def token_bytes(self) -> list[int]:
        """Number of UTF-8 bytes that each token id represents."""
        return self.tokenizer.token_bytes()

    @property
    def tokenizer_json(self) -> str:
        """Tokenizer serialized as JSON, as stored in checkpoints."""
        return self.tokenizer.to_json()

    @property
    def info(self) -> DataInfo:
        """Description of the data for the LightningModule; complete after ``setup``."""
        published = self.tokenizer.published
        return DataInfo(
            name=type(self).__name__,
            vocab_size=self.vocab_size,
            block_size=self.block_size,
            tokenizer_json=self.tokenizer_json,
            start_of_text=self.tokenizer.start_of_text,
            end_of_text=self.tokenizer.end_of_text,
            layout=self.layout,
            rank=self.shard["rank"],
            stop_ids=self.tokenizer.stop_ids,
            published=None if published is None else asdict(published),
            shortest_window=self.block_size_stages[0][1] if self.block_size_stages else None,
        )

    def load_initial_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer of the ``init_from`` model, or None if ``init_from`` is not set.

        Raises:
            UserError: The model cannot be read.
        """
        if self.initial_tokenizer is None and self.init_from is not None:
            self.initial_tokenizer = InitialModel.read(self.init_from).tokenizer
        return self.initial_tokenizer

    @property
    def windows_per_row(self) -> int:
        """Mean number of windows of ``block_size`` tokens per training row, rounded up, or 1 if rows are not split."""
        return 1

    @property
    def tokens_per_batch(self) -> int:
        """Total tokens per micro-batch across all ranks, including padding."""
        return self.batch_size * self.shard["num_replicas"] * self.block_size * self.windows_per_row

    @property
    def shard(self) -> dict[str, int]:
        """Number of data-parallel replicas (``num_replicas``) and this process's data-parallel rank (``rank``).

        All processes of a tensor-parallel group have the same data-parallel rank.
        """
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return {"num_replicas": 1, "rank": 0, **(kwargs or {})}

    @property
    def layout(self) -> BatchLayout:
        """Batch size, number of replicas, and micro-batches per step; call ``set_gradient_accumulation`` first.

        If the number of micro-batches per step grows during the run, it is the final one.
        """
        replicas = self.shard["num_replicas"]
        accumulate = self.trainer.accumulate_grad_batches if self.trainer is not None else 1
        if self.tokens_per_step_stages is not None:  # the trainer has the current number
            accumulate = self.micro_batches_per_step(replicas)
        return BatchLayout(self.batch_size, replicas, accumulate)

    @property
    def order_seed(self) -> int:
        """Seed for the row order: ``seed``, or the global seed if ``seed`` is None."""
        return self.seed if self.seed is not None else global_seed()

    @property
    def train_sampler(self) -> ShuffledSampler:
        """Sampler that yields this process's training batches, from the trainer's current epoch and batch onward."""
        order = ShuffledOrder(self.train_dataset.sizes, self.order_seed, self.weights)
        return ShuffledSampler(order, **self._sampler_arguments(), stages=self._size_stages())

    def _size_stages(self) -> SizeStages | None:
        """Return the stages in which sizes grow, or None if they are constant or the length of the run is unknown."""
        if self.trainer is None or (self.tokens_per_step_stages is None and self.block_size_stages is None):
            return None
        _, replicas, accumulate = self.layout
        step_sizes = [
            (end, self.micro_batches_per_step(replicas, tokens)) for end, tokens in self.tokens_per_step_stages or ()
        ]
        return SizeStages(
            step_sizes=(*step_sizes, (math.inf, accumulate)),
            windows=(*(self.block_size_stages or ()), (math.inf, self.block_size)),
            max_steps=self.trainer.max_steps,
            max_epochs=-1 if self.trainer.max_epochs is None else self.trainer.max_epochs,
        )

    def require_steps_in_stages(self) -> None:
        """Check that the run is limited and long enough for a step in each stage, unless it is a ``fast_dev_run``.

        Raises:
            UserError: The run has no limit on steps or epochs, a stage has no step, or a callback changes the number of
                micro-batches per step.
        """
        stages = self._size_stages()
        if stages is None or self.trainer is None:
            return
        flag = "block_size_stages" if self.tokens_per_step_stages is None else "tokens_per_step_stages"
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
            raise UserError(
                f"data.{flag} does not support the callback GradientAccumulationScheduler; omit one of them"
            )
        if stages.max_steps == stages.max_epochs == -1:
            raise UserError(
                f"data.{flag} ends stages at fractions of the run, which has no limit on steps or epochs; set "
                "--trainer.max_steps or --trainer.max_epochs"
            )
        sampler = self.train_sampler
        if self.trainer.fast_dev_run or not sampler.epoch_length:  # type: ignore[attr-defined]  # as above
            return
        length = stages.run_length(sampler.epoch_length)
        phases = {"block_size_stages": sampler.window_phases, "tokens_per_step_stages": sampler.step_phases}
        for flag, of_size in phases.items():
            if not all(before < after for before, after in pairwise([0, *(min(each.end, length) for each in of_size)])):
                raise UserError(
                    f"data.{flag}: a stage has no step in a run of {length:,.0f} micro-batches; train longer, or use "
                    "fewer stages"
                )

    def _sampler_arguments(self) -> dict[str, Any]:
        batch_size, replicas, accumulate = self.layout
        return {
            "batch_size": batch_size,
            "rank": self.shard["rank"],
            "world_size": replicas,
            "start": self._position(),
            "accumulate": accumulate,
            "limit": 1.0 if self.trainer is None else self.trainer.limit_train_batches,
            "repeats": self._overfits,
        }

    @property
    def _overfits(self) -> bool:
        """Whether ``trainer.overfit_batches`` limits the run to the same batches in every epoch."""
        overfit_batches: float = self.trainer.overfit_batches if self.trainer is not None else 0  # type: ignore[attr-defined]
        return overfit_batches > 0

    def describe_row(self, epoch: int, batch: int, row: int) -> str:
        """Describe a row of this rank's training batch; see ``RowDataset.describe_row``."""
        sampler = self.train_sampler
        step, micro_batch = divmod(batch, sampler.accumulate)
        _, window = sampler.sizes_at(epoch, step * sampler.accumulate)
        if window is not None:  # each row of the dataset is split into several rows of the batch
            row //= self.block_size // window
        index = int(sampler.step_rows(epoch, np.array([step]))[0, micro_batch, sampler.rank, row])
        return self.train_dataset.describe_row(index)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader that yields the training batches in the sampler's order."""
        sampler = self.train_sampler
        if self.trainer is not None and self.tokens_per_step_stages is not None:
            schedule_accumulation(self.trainer, sampler.step_phases)
        return self._loader(self.train_dataset, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return a loader that yields every validation row once."""
        return self._evaluation_loader(self.validation_dataset)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return a loader that yields every test row once.

        Raises:
            UserError: There is no test split.
        """
        if self.test_dataset is None:
            raise UserError(f"{type(self).__name__} has no test split; use the validation split instead")
        return self._evaluation_loader(self.test_dataset)

    def set_gradient_accumulation(self) -> None:
        """Set the trainer's ``accumulate_grad_batches`` so that an optimizer step has ``tokens_per_step`` tokens.

        Raises:
            UserError: ``tokens_per_step`` is not a multiple of the tokens per micro-batch, or conflicts with
                ``trainer.accumulate_grad_batches``.
        """
        if self.tokens_per_step is None:
            return
        batches = self.micro_batches_per_step(self.shard["num_replicas"])
        if self.trainer is None:
            return
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
            raise UserError(
                "data.tokens_per_step and the callback GradientAccumulationScheduler both set the number of "
                "micro-batches per step; omit one of them"
            )
        if self.trainer.accumulate_grad_batches not in (1, batches):
            raise UserError(
                f"data.tokens_per_step implies {batches} micro-batches per step, but trainer.accumulate_grad_batches "
                f"is {self.trainer.accumulate_grad_batches}; set only one of the two"
            )
        self.trainer.accumulate_grad_batches = batches

    def micro_batches_per_step(self, replicas: int, stage_tokens: int | None = None) -> int:
        """Return the number of micro-batches that ``tokens_per_step`` requires, or 1 if it is None.

        Args:
            replicas: Number of data-parallel ranks.
            stage_tokens: Number of tokens per step in one of the ``tokens_per_step_stages``, or None for
                ``tokens_per_step``.

        Raises:
            UserError: The number of tokens per step is not a multiple of the tokens per micro-batch.
        """
        per_batch = self.batch_size * replicas * self.block_size  # a row counts as block_size tokens
        tokens = self.tokens_per_step if stage_tokens is None else stage_tokens
        if tokens is None:
            return 1
        if tokens % per_batch:
            flag = "tokens_per_step" if stage_tokens is None else "tokens_per_step_stages"
            raise UserError(
                f"data.{flag} {'is' if stage_tokens is None else 'contains'} {tokens}, which is not a multiple of the "
                f"{per_batch} tokens per micro-batch (block_size x batch_size x ranks); change "
                f"data.{flag} or data.batch_size"
            )
        return tokens // per_batch

    def _position(self) -> tuple[int, int]:
        """Return the epoch in which training continues, and the index of the next micro-batch in this epoch.

        A resumed trainer restores its progress before it requests the loader. In an unfinished epoch, batches that the
        loader has already yielded are skipped. An epoch whose last batch has been yielded counts as finished, even if
        the trainer had not yet counted the epoch when the checkpoint was saved.
        """
        if self.trainer is None:
            return 0, 0
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current  # the declared type is a base class without these counts
        if epochs.started == epochs.processed:
            return epochs.processed, 0
        batches = loop.epoch_loop.batch_progress
        return (epochs.processed + 1, 0) if batches.is_last_batch else (epochs.processed, batches.current.ready)

    def _evaluation_loader(self, dataset: RowDataset[Any]) -> DataLoader[Any]:
        shard = self.shard
        return self._loader(
            dataset, EvaluationSampler(len(dataset), self.batch_size, shard["rank"], shard["num_replicas"])
        )

    def _loader(self, dataset: RowDataset[Any], sampler: ShuffledSampler | EvaluationSampler) -> DataLoader[Any]:
        if self.num_workers:
            reserve_open_files(self.num_workers)
        return DataLoader(
            dataset,
            sampler=SequentialMicroBatches(sampler) if self._overfits else sampler,
            batch_size=None,  # the sampler yields the indices of whole batches; the dataset collates them
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_stop_signals,
        )


def reject_null(given: dict[str, Any]) -> None:
    """Reject arguments that are None; the command line accepts ``null`` for arguments of any type."""
    for name, value in given.items():
        if value is None:
            raise UserError(f"data.{name} is null; omit it to use the default")


def require_positive_ints(given: dict[str, int | None]) -> None:
    """Reject sizes outside the range 1 to ``MAX_SIZE - 1``; allow None."""
    for name, value in given.items():
        if value is not None and not 1 <= value < MAX_SIZE:
            raise UserError(f"data.{name} is {value}; it must be positive and less than {MAX_SIZE:,}")


OPEN_FILES: Final = 32
"""Number of files that a run may open in addition to the files for its DataLoader workers."""
OPEN_FILES_PER_WORKER: Final = 16
"""Maximum number of open files per DataLoader worker, for pipes and prefetched batches.

The number is large enough for two DataLoaders, which are open at the same time during validation.
"""


def reserve_open_files(workers: int) -> None:
    """Raise the soft limit on open files if it is too low for the given number of DataLoader workers.

    Otherwise, a loader could run out of file descriptors and fail at any time, in any of its processes.

    Raises:
        UserError: The hard limit is too low.
    """
    if sys.platform == "win32":
        return
    import resource

    opened = Path("/proc/self/fd")
    needed = OPEN_FILES + OPEN_FILES_PER_WORKER * workers + (len(list(opened.iterdir())) if opened.is_dir() else 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    if hard != unlimited and hard < needed:
        raise UserError(
            f"data.num_workers is {workers}, which requires about {needed} open files, but the limit is {hard}; raise "
            "it with ulimit -n, or lower data.num_workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def ignore_stop_signals(worker: int) -> None:
    """Ignore termination signals in a DataLoader worker, so that the trainer can still finish its last step.

    Terminals and SLURM send signals to all processes of a run. Workers exit when the trainer closes the loader or
    itself exits.
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """Kill workers whose loader was not closed, for example after an error.

    At exit, ``multiprocessing`` sends SIGTERM to its daemon processes and waits for them, but these workers ignore
    SIGTERM. This function runs first, because exit handlers run in reverse order of registration.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report a killed worker as an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
