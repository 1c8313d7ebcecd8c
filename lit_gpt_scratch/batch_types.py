"""What the data modules (``data``) and the LightningModules (``tasks``) exchange: batches, and facts about the data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from torch import Tensor
from typing_extensions import NotRequired, TypedDict

IGNORE_INDEX: Final = -100
"""Label of a position without a loss, PyTorch's own convention."""
PADDING_MULTIPLE: Final = 8
"""Padded rows have a multiple of this length: tensor cores run faster, and there are fewer distinct shapes."""


class Batch(TypedDict):
    """``B`` rows of ``T`` tokens for next-token prediction.

    ``labels[b, t]`` is the token that follows ``input_ids[b, t]``: labels are shifted once, where the batch is made,
    and nowhere else. A label of ``IGNORE_INDEX`` (-100) has no loss.

    With ``document_ids`` a token attends only to tokens of its own document, and positions count from that document's
    first token. The tokens of a document are contiguous.
    """

    input_ids: Tensor
    """(B, T) int64"""
    labels: Tensor
    """(B, T) int64"""
    document_ids: NotRequired[Tensor]
    """(B, T) int64, a different number for each document of a row"""
    step_labels: NotRequired[Tensor]
    """() int64, training only: labels of the whole optimizer step, over all micro-batches and data-parallel ranks"""


class LabelledBatch(TypedDict):
    """``B`` texts with a class each, padded at the right to one length ``T``."""

    input_ids: Tensor
    """(B, T) int64"""
    lengths: Tensor
    """(B,) int64, tokens of each text; 0 for a padding row"""
    labels: Tensor
    """(B,) int64, class index of each text; ``IGNORE_INDEX`` for a padding row"""
    step_class_counts: NotRequired[Tensor]
    """(n_classes,) int64, training only: texts of each class in the whole optimizer step"""


class PairBatch(TypedDict):
    """``B`` pairs of conversations that differ in their last reply, with the end of text after that reply.

    They are ``2 B`` rows, so that one forward pass computes both: the chosen ones, then the rejected ones in the same
    order, all padded at the right to one length ``T``.
    """

    input_ids: Tensor
    """(2 B, T) int64"""
    labels: Tensor
    """(2 B, T) int64, the next token where it belongs to the last reply or ends it, elsewhere ``IGNORE_INDEX``"""
    lengths: Tensor
    """(2 B,) int64, tokens of each row; 0 for a padding pair"""
    step_labels: NotRequired[Tensor]
    """() int64, training only: pairs of the whole optimizer step"""


class PromptIndexBatch(TypedDict):
    """``B`` rows by index: rollouts of the run in training, prompts in validation. The policy generates the rest."""

    indices: Tensor
    """(B,) int64"""
    step_indices: NotRequired[Tensor]
    """(N,) int64, training only: the rollouts of the whole optimizer step"""


STEP_KEYS: Final = frozenset({"step_labels", "step_class_counts", "step_indices"})
"""Entries of a batch that describe the optimizer step; all others have one row per example."""


class RolloutPhase(NamedTuple):
    """How long one generation phase lasts.

    Attributes:
        steps: Optimizer steps of one pass over the rollouts of a phase.
        passes: Passes over each phase's rollouts.
    """

    steps: int
    passes: int


class BatchLayout(NamedTuple):
    """How the rows of an optimizer step are distributed.

    Attributes:
        batch_size: Rows per data-parallel rank and micro-batch.
        replicas: Data-parallel ranks.
        accumulate: Micro-batches per optimizer step.
    """

    batch_size: int
    replicas: int
    accumulate: int

    @property
    def rows_per_batch(self) -> int:
        """Rows of a micro-batch over all ranks."""
        return self.batch_size * self.replicas

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all ranks."""
        return self.rows_per_batch * self.accumulate


DataSplit = Literal["train", "validation", "test"]
TextRewardFunction = Callable[[Sequence[str], Sequence[str]], Any]


@dataclass
class PromptSource:
    """The prompts of an on-policy run.

    Attributes:
        counts: Number of prompts by split.
        reply_tokens: The most tokens of a generated reply, its end of text included.
        lookup: (split, prompt indices) -> token ids of each prompt, text of each prompt.
        shuffled: Positions in the run -> training prompt indices: every prompt once, then every prompt again.
        decode: Token ids -> text.
        text_reward: Reward name, or None for the data's own -> (name, function, unended score). The function maps
            prompts, and one reply for each, to one number for each: a list, an array or a tensor. The unended score is
            that of a truncated reply; None for whatever the function returns.
        reply_check: () -> the verifiable preference by which replies are checked, if there is one.
        phase: Set by the policy before training; the data module needs it to order the rollouts.
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
    """What a LightningModule needs to know about its data, as plain values.

    Attributes:
        name: The data module's class, for error messages.
        vocab_size: Number of token ids.
        block_size: Tokens of the longest row.
        token_bytes: UTF-8 bytes of text that each token id stands for, (vocab_size,).
        tokenizer_json: The text of the tokenizer's file, which checkpoints embed.
        start_of_text: Token id before every document.
        end_of_text: Token id after every document.
        layout: How an optimizer step is distributed.
        rank: The data-parallel rank of this process; ranks of a tensor-parallel group share it.
        class_names: Of labelled text, by class index.
        class_counts: Of labelled text, training examples of each class.
        has_pairs: Whether batches are ``PairBatch``es.
        truncates: Whether rows that are too long are truncated.
        prompts: Of data for on-policy training.
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
