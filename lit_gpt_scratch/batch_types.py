"""The contract between what makes batches (``data``) and what learns from them (``tasks``)."""

from typing import Final, NamedTuple

from torch import Tensor
from typing_extensions import NotRequired, TypedDict

IGNORE_INDEX: Final = -100
"""Label of a position that is not scored, PyTorch's own convention."""
PADDING_MULTIPLE: Final = 8
"""Of positions, as which rows of uneven lengths are filled up: tensor cores like it, and it leaves few widths."""


class Batch(TypedDict):
    """``B`` windows of ``T`` tokens.

    ``labels[b, t]`` is the token that follows ``input_ids[b, t]``: they are shifted once, where the
    batch is made, and nowhere else. A label of ``IGNORE_INDEX`` (-100) is not scored.

    With ``document_ids`` a token attends only to tokens of its own document, and positions count from the first of
    them. The tokens of a document stand side by side.
    """

    input_ids: Tensor
    """(B, T) int64"""
    labels: Tensor
    """(B, T) int64"""
    document_ids: NotRequired[Tensor]
    """(B, T) int64, another number for each document of a window"""


class LabelledBatch(TypedDict):
    """``B`` texts with a class each, filled up behind their last token to one length ``T``."""

    input_ids: Tensor
    """(B, T) int64"""
    lengths: Tensor
    """(B,) int64, tokens of each text; 0 of a row that only fills the batch up"""
    labels: Tensor
    """(B,) int64, the number of each text's class; ``IGNORE_INDEX`` of a row that only fills the batch up"""


class PairBatch(TypedDict):
    """``B`` pairs of conversations that differ in their last reply, each whole, with the end of text behind the reply.

    They are ``2 B`` rows, so that one forward pass sees both: the preferred ones, then the others in the same order,
    all filled up behind their last token to one length ``T``.
    """

    input_ids: Tensor
    """(2 B, T) int64"""
    labels: Tensor
    """(2 B, T) int64, the token that follows where that is of the last reply or ends it, elsewhere ``IGNORE_INDEX``"""
    lengths: Tensor
    """(2 B,) int64, tokens of each row; 0 of a pair that only fills the batch up"""


class PromptIndexBatch(TypedDict):
    """``B`` rows by their numbers alone; what is in them, the task asks the data module for, or makes it."""

    numbers: Tensor
    """(B,) int64"""


class RolloutPhase(NamedTuple):
    """How long one policy writes, and how often what it wrote is learned from.

    Attributes:
        steps: Optimizer steps that it takes to see every row once.
        passes: How often each row is seen.
    """

    steps: int
    passes: int


class BatchLayout(NamedTuple):
    """How the windows of an optimizer step are dealt out.

    Attributes:
        batch_size: Windows per data-parallel rank and micro-batch.
        replicas: Data-parallel ranks.
        accumulate: Micro-batches per optimizer step.
    """

    batch_size: int
    replicas: int
    accumulate: int

    @property
    def rows_per_batch(self) -> int:
        """Windows of a micro-batch over all ranks."""
        return self.batch_size * self.replicas

    @property
    def rows_per_step(self) -> int:
        """Windows of an optimizer step over all ranks."""
        return self.rows_per_batch * self.accumulate
