"""What windows are laid from: a row of tokens, with the borders of its documents and what is to be predicted."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class TokenStream(Protocol):
    """Documents, one behind the other: the shards of a store (``text.shards.Stream``), or records in memory."""

    @property
    def n_tokens(self) -> int:
        """How many there are."""

    @property
    def n_documents(self) -> int:
        """Documents."""

    def read_with_labels(self, start: int, length: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """So many tokens, and what is to be predicted at each, or ``IGNORE_INDEX``; the last of all may have none."""

    def document_spans(self) -> Iterator[tuple[Integers, Integers]]:
        """Part by part, the first token of its documents and how many tokens each has."""

    def document_starts(self, start: int, stop: int) -> Integers:
        """Which of the tokens ``start`` to ``stop`` are the first of a document."""

    def describe_position(self, token: int) -> str:
        """What holds a token, for a message."""


class RecordTokenStream:
    """Records in memory, each a document.

    Args:
        names: Of each record, for a message.
        inputs: Of each, (n,) int64, at least one.
        labels: Of each, (n,) int64: what is to be predicted at each input, or ``IGNORE_INDEX``.
    """

    def __init__(self, names: Sequence[str], inputs: Sequence[Integers], labels: Sequence[Integers]) -> None:
        self.names = names
        self._lengths = np.array([len(ids) for ids in inputs], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._inputs = np.concatenate([np.zeros(0, np.int64), *inputs])
        self._labels = np.concatenate([np.zeros(0, np.int64), *labels])

    @property
    def n_tokens(self) -> int:
        """Inputs of all records."""
        return len(self._inputs)

    @property
    def n_documents(self) -> int:
        """Records."""
        return len(self.names)

    def read_with_labels(self, start: int, length: int) -> tuple[Integers, Integers]:
        """So many inputs, and what is to be predicted at each."""
        return self._inputs[start : start + length], self._labels[start : start + length]

    def document_spans(self) -> Iterator[tuple[Integers, Integers]]:
        """All records at once."""
        yield self._starts, self._lengths

    def document_starts(self, start: int, stop: int) -> Integers:
        """Which of the inputs are the first of a record."""
        return self._starts[slice(*np.searchsorted(self._starts, (start, stop)))]

    def describe_position(self, token: int) -> str:
        """The record that holds an input."""
        return self.names[bisect_right(self._starts, token) - 1]
