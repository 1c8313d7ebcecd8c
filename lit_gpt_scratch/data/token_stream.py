"""Sequences of tokens with document boundaries and labels: the input of packing."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.batch_types import IGNORE_INDEX

Integers = NDArray[np.int64]


class TokenStream(Protocol):
    """Concatenated documents: the shards of a store (``text.token_shards.Stream``), or records in memory."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""

    @property
    def n_documents(self) -> int:
        """Number of documents."""

    def read_with_labels(self, start: int, length: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """``length`` tokens and their labels (``IGNORE_INDEX`` for none); the stream's last token may lack a label."""

    def count_labels(self, starts: Integers, lengths: Integers) -> Integers:
        """Number of labels of each of several stretches, given their first tokens and lengths: (n,) -> (n,)."""

    def document_spans(self) -> Iterator[tuple[Integers, Integers]]:
        """For each shard, the first token and the number of tokens of each of its documents."""

    def document_starts(self, start: int, stop: int) -> Integers:
        """Positions in ``[start, stop)`` of tokens that are the first of a document."""

    def describe_position(self, token: int) -> str:
        """What contains a token (a shard, a record), for an error message."""


class RecordTokenStream:
    """Records in memory as a token stream; each record is a document.

    Args:
        names: Name of each record, for error messages.
        inputs: Input ids of each record, (n,) int64, at least one.
        labels: Labels of each record, (n,) int64; ``IGNORE_INDEX`` for none.
    """

    def __init__(self, names: Sequence[str], inputs: Sequence[Integers], labels: Sequence[Integers]) -> None:
        self.names = names
        self._lengths = np.array([len(ids) for ids in inputs], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._inputs = np.concatenate([np.zeros(0, np.int64), *inputs])
        self._labels = np.concatenate([np.zeros(0, np.int64), *labels])
        self._labels_before = np.concatenate([[0], np.cumsum(self._labels != IGNORE_INDEX)])

    @property
    def n_tokens(self) -> int:
        """Number of input tokens of all records."""
        return len(self._inputs)

    @property
    def n_documents(self) -> int:
        """Number of records."""
        return len(self.names)

    def read_with_labels(self, start: int, length: int) -> tuple[Integers, Integers]:
        """``length`` input tokens and their labels."""
        return self._inputs[start : start + length], self._labels[start : start + length]

    def count_labels(self, starts: Integers, lengths: Integers) -> Integers:
        """Number of labels of each of several stretches: (n,) -> (n,)."""
        counts: Integers = self._labels_before[starts + lengths] - self._labels_before[starts]
        return counts

    def document_spans(self) -> Iterator[tuple[Integers, Integers]]:
        """First token and length of each record, all at once."""
        yield self._starts, self._lengths

    def document_starts(self, start: int, stop: int) -> Integers:
        """Positions in ``[start, stop)`` of inputs that are the first of a record."""
        return self._starts[slice(*np.searchsorted(self._starts, (start, stop)))]

    def describe_position(self, token: int) -> str:
        """The name of the record that contains an input token."""
        return self.names[bisect_right(self._starts, token) - 1]
