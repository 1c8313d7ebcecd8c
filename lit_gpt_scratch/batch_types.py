"""Batch types and data properties shared by the data modules (``data``) and the LightningModules (``tasks``)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from torch import Tensor
from typing_extensions import NotRequired, TypedDict

IGNORE_INDEX: Final = -100
"""Label of positions that the loss ignores; the default ``ignore_index`` of ``torch.nn.CrossEntropyLoss``."""
PADDING_MULTIPLE: Final = 8
"""Row lengths are padded to a multiple of this number, to suit tensor cores and limit the number of tensor shapes."""


class Batch(TypedDict):
    """``B`` rows of ``T`` tokens for next-token prediction.

    ``labels[b, t]`` is the token that follows ``input_ids[b, t]``: the labels are already shifted, and the model must
    not shift them again. Positions whose label is ``IGNORE_INDEX`` (-100) are ignored in the loss.

    If the batch contains ``document_ids``, each token attends only to tokens of the same document, and positions are
    counted from the first token of the document. The tokens of a document are contiguous.
    """

    input_ids: Tensor
    """Token ids, int64 tensor of shape (B, T)."""
    labels: Tensor
    """Label of each position, int64 tensor of shape (B, T)."""
    document_ids: NotRequired[Tensor]
    """Id of the document that contains each token, int64 tensor of shape (B, T); ids are unique within a row."""
    step_labels: NotRequired[Tensor]
    """Number of labels in the optimizer step, across all micro-batches and data-parallel ranks, int64 scalar; only in
    training."""
    text_bytes: NotRequired[Tensor]
    """Number of UTF-8 bytes that the labels of each row represent, int64 tensor of shape (B,); required in validation
    and testing."""


class LabelledBatch(TypedDict):
    """``B`` documents with one class label each, in ``W`` windows that are right-padded to a common length ``T``.

    Without ``window_counts``, each document has one window, and ``W`` equals ``B``.
    """

    input_ids: Tensor
    """Token ids, int64 tensor of shape (W, T)."""
    lengths: Tensor
    """Number of tokens in each window, or 0 for a padding row, int64 tensor of shape (W,)."""
    window_counts: NotRequired[Tensor]
    """Number of windows per document, int64 tensor of shape (B,); the windows of a document are contiguous."""
    labels: Tensor
    """Class index of each document, or ``IGNORE_INDEX`` for a padding row, int64 tensor of shape (B,)."""
    step_class_counts: NotRequired[Tensor]
    """Number of documents per class in the optimizer step, int64 tensor of shape (n_classes,); only in training."""


class PairBatch(TypedDict):
    """``B`` pairs of conversations that differ only in the last reply, which ends with an end-of-text token.

    The pairs form ``2 B`` rows, so that a single forward pass processes both conversations of each pair: first all
    chosen conversations, then all rejected conversations in the same order. All rows are right-padded to a common
    length ``T``.
    """

    input_ids: Tensor
    """Token ids, int64 tensor of shape (2 B, T)."""
    labels: Tensor
    """Next token if it belongs to the last reply (end-of-text included), otherwise ``IGNORE_INDEX``; int64 tensor of
    shape (2 B, T)."""
    lengths: Tensor
    """Number of tokens in each row, or 0 for a padding pair, int64 tensor of shape (2 B,)."""
    step_labels: NotRequired[Tensor]
    """Number of pairs in the optimizer step, int64 scalar; only in training."""


class PromptIndexBatch(TypedDict):
    """``B`` indices of rollouts (training) or prompts (validation and test). The policy generates the replies."""

    indices: Tensor
    """Indices of the rollouts or prompts, int64 tensor of shape (B,)."""
    step_indices: NotRequired[Tensor]
    """Indices of all rollouts in the optimizer step, int64 tensor of shape (N,); only in training."""


STEP_KEYS: Final = frozenset({"step_labels", "step_class_counts", "step_indices"})
"""Keys of batch entries that describe the whole optimizer step; all other entries have one row per example."""


class RolloutPhase(NamedTuple):
    """Length of a rollout phase, in which replies are generated once and then used for several training passes.

    Attributes:
        steps: Number of optimizer steps per pass over the phase's rollouts.
        passes: Number of passes over the phase's rollouts.
    """

    steps: int
    passes: int


class BatchLayout(NamedTuple):
    """Distribution of an optimizer step's rows over micro-batches and ranks.

    Attributes:
        batch_size: Number of rows per micro-batch and data-parallel rank.
        replicas: Number of data-parallel ranks.
        accumulate: Number of micro-batches per optimizer step; if it grows during the run, the final number.
    """

    batch_size: int
    replicas: int
    accumulate: int

    @property
    def rows_per_batch(self) -> int:
        """Number of rows per micro-batch across all data-parallel ranks."""
        return self.batch_size * self.replicas

    @property
    def rows_per_step(self) -> int:
        """Number of rows per optimizer step across all data-parallel ranks."""
        return self.rows_per_batch * self.accumulate


DataSplit = Literal["train", "validation", "test"]
TextRewardFunction = Callable[[Sequence[str], Sequence[str]], Any]


@dataclass
class PromptSource:
    """Prompts for on-policy training, with functions that look up prompts and reward replies.

    Attributes:
        counts: Number of prompts in each split.
        reply_tokens: Maximum number of tokens per generated reply, including the end-of-text token.
        lookup: Function that returns the token ids and the texts of the prompts at the given indices of a split.
        shuffled: Function that maps positions in the run to indices of training prompts. All prompts occur once before
            any prompt is repeated.
        decode: Function that maps token ids to text.
        text_reward: Function that looks up a reward function by name, or the data module's default if the name is None.
            It returns the name, the reward function, and the reward for truncated replies, which is None if the reward
            function also scores truncated replies. The reward function accepts a list of prompts and a list of replies,
            one per prompt, and returns one number per reply as a list, an array or a tensor.
        reply_check: Function that returns a predicate, or None if replies are not checked. The predicate tests whether
            a reply earns a verifiable reward.
        phase: Number of optimizer steps per pass and number of passes in a rollout phase. The policy sets this field
            before training, because the data module needs it to order the rollouts.
    """

    counts: dict[DataSplit, int]
    reply_tokens: int
    lookup: Callable[[DataSplit, Sequence[int]], tuple[list[list[int]], list[str]]]
    shuffled: Callable[[Sequence[int]], list[int]]
    decode: Callable[[list[int]], str]
    text_reward: Callable[[str | None], tuple[str, TextRewardFunction, float | None]]
    reply_check: Callable[[], Callable[[str], bool] | None]
    phase: RolloutPhase | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptSource":
        """Return self, so that copies of a task, as made by Lightning's ``WeightAveraging``, share the data module."""
        return self


@dataclass(frozen=True)
class DataInfo:
    """Properties of the data that LightningModules depend on, as plain values.

    Attributes:
        name: Class name of the data module, used in error messages.
        vocab_size: Number of token ids.
        block_size: Maximum number of tokens per row.
        tokenizer_json: Tokenizer as a JSON string, which is stored in checkpoints.
        start_of_text: Id of the token before each document.
        end_of_text: Id of the token after each document.
        layout: Distribution of an optimizer step's rows over micro-batches and ranks.
        rank: Data-parallel rank of this process; all processes of a tensor-parallel group have the same rank.
        class_names: Class names, indexed by class, or None if the data has no class labels.
        class_counts: Number of training examples per class, or None if the data has no class labels.
        has_pairs: Whether batches are of type ``PairBatch``.
        truncates: Whether rows that are too long are truncated.
        max_windows: Maximum number of ``block_size``-token windows into which a row that is too long is split.
        prompts: Source of the prompts for on-policy training, or None for other data.
        stop_ids: Token ids at which generation stops, or an empty set if it stops only at ``end_of_text``.
        published: Fields of the tokenizer's ``PublishedSettings``, which are stored in checkpoints, or None if the
            tokenizer does not belong to a published model.
        shortest_window: Number of tokens per window in the first stage of a run in which windows grow to
            ``block_size``, or None if they do not grow.
    """

    name: str
    vocab_size: int
    block_size: int
    tokenizer_json: str
    start_of_text: int
    end_of_text: int
    layout: BatchLayout
    rank: int
    class_names: list[str] | None = None
    class_counts: list[int] | None = None
    has_pairs: bool = False
    truncates: bool = False
    max_windows: int = 1
    prompts: PromptSource | None = None
    stop_ids: frozenset[int] = frozenset()
    published: dict[str, Any] | None = None
    shortest_window: int | None = None
