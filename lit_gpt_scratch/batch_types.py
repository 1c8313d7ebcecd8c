"""Types shared by the data modules (``data``) and the LightningModules (``tasks``): batches and data properties."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from torch import Tensor
from typing_extensions import NotRequired, TypedDict

IGNORE_INDEX: Final = -100
"""Label of positions that are ignored in the loss, as in PyTorch."""
PADDING_MULTIPLE: Final = 8
"""Rows are padded to a multiple of this length, for tensor cores and to limit the number of distinct shapes."""


class Batch(TypedDict):
    """``B`` rows of ``T`` tokens for next-token prediction.

    ``labels[b, t]`` is the token that follows ``input_ids[b, t]``: labels are shifted only once, when the batch is
    created. Labels of ``IGNORE_INDEX`` (-100) are ignored in the loss.

    With ``document_ids``, each token attends only to tokens in its own document, and positions are counted from the
    document's first token. The tokens of a document are contiguous.
    """

    input_ids: Tensor
    """(B, T) int64"""
    labels: Tensor
    """(B, T) int64"""
    document_ids: NotRequired[Tensor]
    """(B, T) int64, a different number for each document in a row"""
    step_labels: NotRequired[Tensor]
    """() int64, training only: number of labels in the optimizer step, over all micro-batches and data-parallel
    ranks"""


class LabelledBatch(TypedDict):
    """``B`` texts with one class each, right-padded to a common length ``T``."""

    input_ids: Tensor
    """(B, T) int64"""
    lengths: Tensor
    """(B,) int64, number of tokens in each text; 0 for a padding row"""
    labels: Tensor
    """(B,) int64, class index of each text; ``IGNORE_INDEX`` for a padding row"""
    step_class_counts: NotRequired[Tensor]
    """(n_classes,) int64, training only: number of texts per class in the optimizer step"""


class PairBatch(TypedDict):
    """``B`` pairs of conversations that differ only in their last reply, which is followed by the end of text.

    They form ``2 B`` rows, so that a single forward pass computes both: all chosen conversations, then the rejected
    ones in the same order. All rows are right-padded to a common length ``T``.
    """

    input_ids: Tensor
    """(2 B, T) int64"""
    labels: Tensor
    """(2 B, T) int64, the next token if it belongs to the last reply or ends it, otherwise ``IGNORE_INDEX``"""
    lengths: Tensor
    """(2 B,) int64, number of tokens in each row; 0 for a padding pair"""
    step_labels: NotRequired[Tensor]
    """() int64, training only: number of pairs in the optimizer step"""


class PromptIndexBatch(TypedDict):
    """``B`` indices: of rollouts in training, of prompts in validation. The policy generates the replies."""

    indices: Tensor
    """(B,) int64"""
    step_indices: NotRequired[Tensor]
    """(N,) int64, training only: indices of all rollouts in the optimizer step"""


STEP_KEYS: Final = frozenset({"step_labels", "step_class_counts", "step_indices"})
"""Entries of a batch that describe the whole optimizer step; all others have one row per example."""


class RolloutPhase(NamedTuple):
    """Length of a rollout phase: replies are generated once, then trained on for several passes.

    Attributes:
        steps: Optimizer steps per pass over the rollouts of a phase.
        passes: Passes over the rollouts of a phase.
    """

    steps: int
    passes: int


class BatchLayout(NamedTuple):
    """Distribution of an optimizer step's rows over micro-batches and ranks.

    Attributes:
        batch_size: Rows per micro-batch and data-parallel rank.
        replicas: Number of data-parallel ranks.
        accumulate: Micro-batches per optimizer step.
    """

    batch_size: int
    replicas: int
    accumulate: int

    @property
    def rows_per_batch(self) -> int:
        """Total rows per micro-batch across all ranks."""
        return self.batch_size * self.replicas

    @property
    def rows_per_step(self) -> int:
        """Total rows per optimizer step across all ranks."""
        return self.rows_per_batch * self.accumulate


DataSplit = Literal["train", "validation", "test"]
TextRewardFunction = Callable[[Sequence[str], Sequence[str]], Any]


@dataclass
class PromptSource:
    """Prompts for an on-policy run, and functions to look them up and to reward replies.

    Attributes:
        counts: Number of prompts in each split.
        reply_tokens: Maximum tokens per generated reply, including the end of text.
        lookup: Function that maps a split and prompt indices to the prompts' token ids and texts.
        shuffled: Function that maps positions in the run to indices of training prompts. Every prompt occurs once
            before any occurs again.
        decode: Function that maps token ids to text.
        text_reward: Function that maps a reward's name, or None for the data's own reward, to (name, reward function,
            unended score). The reward function maps prompts, and one reply to each, to one number per reply, as a list,
            array or tensor. The unended score is the score of truncated replies; None keeps the reward function's.
        reply_check: Function that returns the verifiable preference's check of a reply, or None if there is none.
        phase: Length of a rollout phase. The policy sets it before training, because the data module requires it to
            order the rollouts.
    """

    counts: dict[DataSplit, int]
    reply_tokens: int
    lookup: Callable[[DataSplit, Sequence[int]], tuple[list[list[int]], list[str]]]
    shuffled: Callable[[Sequence[int]], list[int]]
    decode: Callable[[list[int]], str]
    text_reward: Callable[[str | None], tuple[str, TextRewardFunction, float | None]]
    reply_check: Callable[[], Callable[[str], bool] | None]
    phase: RolloutPhase | None = None


@dataclass(frozen=True)
class DataInfo:
    """Properties of the data that a LightningModule depends on, as plain values.

    Attributes:
        name: Class name of the data module, for error messages.
        vocab_size: Number of token ids.
        block_size: Maximum tokens per row.
        token_bytes: Number of UTF-8 bytes of text per token id, (vocab_size,).
        tokenizer_json: Content of the tokenizer file, which checkpoints embed.
        start_of_text: Token id before each document.
        end_of_text: Token id after each document.
        layout: Distribution of an optimizer step's rows over micro-batches and ranks.
        rank: Data-parallel rank of this process; the processes of a tensor-parallel group have the same one.
        class_names: Class names by class index, if the text is labelled.
        class_counts: Number of training examples per class, if the text is labelled.
        has_pairs: Whether batches are of type ``PairBatch``.
        truncates: Whether rows that are too long are truncated.
        prompts: The prompts, if the data is for on-policy training.
    """

    name: str
    vocab_size: int
    block_size: int
    token_bytes: list[int]
    tokenizer_json: str
    start_of_text: int
    end_of_text: int
    layout: BatchLayout
    rank: int
    class_names: list[str] | None = None
    class_counts: list[int] | None = None
    has_pairs: bool = False
    truncates: bool = False
    prompts: PromptSource | None = None
