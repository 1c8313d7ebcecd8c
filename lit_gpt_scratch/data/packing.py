"""Packing: assign the documents of a token stream to windows of T tokens.

A window is a list of pieces; a piece is a contiguous span of the token stream. A window's inputs are the tokens of its
pieces; its labels are the tokens one position later in the stream. With every policy, the last token of a document
therefore predicts end-of-text, and never the first token of the next piece in the window. The policies differ in which
pieces form a window:

- ``concatenate``: The stream is split every T tokens, so each window is a single piece. There is no padding, but
  documents are split at arbitrary tokens.
- ``best_fit``: Documents longer than T are split into pieces of T tokens; the last piece of a document may be shorter.
  Each piece, longest first, goes into the fullest window with enough free space (Ding et al. 2024,
  https://arxiv.org/abs/2404.10830). Documents that fit into a window are not split.
- ``one_document``: The pieces are the same as with ``best_fit``, but each piece has its own window.
"""

import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.data.token_store import hash_json
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import read_json, validate
from lit_gpt_scratch.text.atomic_files import create_folder_atomically
from lit_gpt_scratch.text.token_shards import PicklableMemmaps, ShardedTokenStream, require_file_size

Integers = NDArray[np.int64]


class TokenStream(Protocol):
    """Interface of a stream of concatenated documents: a ``ShardedTokenStream`` on disk, or records in memory."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens."""

    @property
    def n_documents(self) -> int:
        """Number of documents."""

    def read_with_labels(self, start: int, length: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return ``length`` tokens starting at position ``start``, and their labels.

        ``IGNORE_INDEX`` marks a token without a label. If the last token of the stream has no label, the array of
        labels may be one element shorter than the array of tokens.
        """

    def count_labels(self, starts: Integers, lengths: Integers) -> Integers:
        """Count the labels in each span, given the start positions and lengths of the spans, arrays of shape (n,)."""

    def document_spans(self) -> Iterator[tuple[Integers, Integers]]:
        """Yield two arrays for each shard: the start position and the length of each document."""

    def document_starts(self, start: int, stop: int) -> Integers:
        """Return the positions in ``[start, stop)`` at which a document starts."""

    def describe_position(self, token: int) -> str:
        """Describe the shard or record that contains the token at a position, for error messages."""


class RecordTokenStream:
    """Token stream of records in memory; each record is a document.

    Args:
        names: Name of each record, used in error messages.
        inputs: Input ids of each record, int64 arrays of shape (n,) with n >= 1.
        labels: Labels of each record, int64 arrays of shape (n,); ``IGNORE_INDEX`` marks a token without a label.
        label_bytes: Number of text bytes that each label represents, int64 arrays of shape (n,); 0 by default.
    """

    def __init__(
        self,
        names: Sequence[str],
        inputs: Sequence[Integers],
        labels: Sequence[Integers],
        label_bytes: Iterable[Integers | None] = (),
    ) -> None:
        self.names = names
        self._lengths = np.array([len(ids) for ids in inputs], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._inputs = np.concatenate([np.zeros(0, np.int64), *inputs])
        self._labels = np.concatenate([np.zeros(0, np.int64), *labels])
        self._labels_before = np.concatenate([[0], np.cumsum(self._labels != IGNORE_INDEX)])
        counted = [np.zeros_like(each) for each in labels]
        for row, sizes in zip(counted, label_bytes, strict=False):
            row += 0 if sizes is None else sizes
        self._bytes_before = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *counted]))])

    @property
    def n_tokens(self) -> int:
        """Number of input tokens in all records."""
        return len(self._inputs)

    @property
    def n_documents(self) -> int:
        """Number of records."""
        return len(self.names)

    def read_with_labels(self, start: int, length: int) -> tuple[Integers, Integers]:
        """Return ``length`` input tokens starting at position ``start``, and their labels."""
        return self._inputs[start : start + length], self._labels[start : start + length]

    def count_labels(self, starts: Integers, lengths: Integers) -> Integers:
        """Count the labels in each span, given the start positions and lengths of the spans, arrays of shape (n,)."""
        counts: Integers = self._labels_before[starts + lengths] - self._labels_before[starts]
        return counts

    def count_bytes(self, start: int, length: int) -> int:
        """Return the number of text bytes that the labels in a span represent."""
        return int(self._bytes_before[start + length] - self._bytes_before[start])

    def document_spans(self) -> Iterator[tuple[Integers, Integers]]:
        """Yield a single pair of arrays: the start position and the length of each record."""
        yield self._starts, self._lengths

    def document_starts(self, start: int, stop: int) -> Integers:
        """Return the positions in ``[start, stop)`` at which a record starts."""
        return self._starts[slice(*np.searchsorted(self._starts, (start, stop)))]

    def describe_position(self, token: int) -> str:
        """Return the name of the record that contains the token at a position."""
        return self.names[bisect_right(self._starts, token) - 1]


PackingPolicy = Literal["concatenate", "best_fit", "one_document"]
PACKING_POLICIES: Final[tuple[PackingPolicy, ...]] = get_args(PackingPolicy)
BinPackingPolicy = Literal["best_fit", "one_document"]

PLAN_FORMAT: Final = 1
"""File format version of cached plans; part of their cache key."""


@dataclass(frozen=True)
class PackingCost:
    """Cost of a packing policy: padding, discarded tokens and split documents. Supports addition.

    Attributes:
        windows: Number of windows.
        positions: Total number of positions in all windows.
        documents: Number of documents.
        padding: Number of positions without a token.
        discarded: Number of tokens that are not in any window.
        split: Number of documents that span more than one window.
        split_needlessly: Number of documents that are split although they would fit into one window.
        crossing: Number of windows with tokens from more than one document.
    """

    windows: int = 0
    positions: int = 0
    documents: int = 0
    padding: int = 0
    discarded: int = 0
    split: int = 0
    split_needlessly: int = 0
    crossing: int = 0

    def __add__(self, other: "PackingCost") -> "PackingCost":
        return PackingCost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def used(self) -> float:
        """Fraction of positions that contain a token."""
        return 1 - self.padding / max(self.positions, 1)

    TABLE_HEADER: ClassVar = (
        "windows",
        "positions used",
        "tokens discarded",
        "documents split",
        "needlessly",
        "windows crossing",
    )

    @property
    def table_row(self) -> list[str]:
        """Formatted table cells, in the order of ``TABLE_HEADER``."""
        documents, windows = max(self.documents, 1), max(self.windows, 1)
        shares = self.split / documents, self.split_needlessly / documents, self.crossing / windows
        return [f"{self.windows:,}", f"{self.used:.2%}", f"{self.discarded:,}", *(f"{share:.1%}" for share in shares)]


class PackingPlan(Protocol):
    """Interface of a packing plan, which assigns the tokens of a stream to windows.

    Each window consists of one or more pieces; a piece is a contiguous span of the stream.

    Attributes:
        crosses: Whether a piece may contain tokens of more than one document.
    """

    crosses: ClassVar[bool]

    @property
    def stream(self) -> TokenStream:
        """Token stream to pack."""

    @property
    def cost(self) -> PackingCost:
        """Packing cost of the plan."""

    def __len__(self) -> int: ...

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """Return the start position and length of each piece (contiguous span of the stream) in a window.

        The list is empty for an index past the last window.
        """

    def count_labels(self, windows: Integers) -> int:
        """Count the labels in the windows with the given indices, an array of shape (n,)."""


def plan_packing(stream: ShardedTokenStream, block_size: int, policy: PackingPolicy, cache: Path) -> PackingPlan:
    """Assign the tokens of a stream to training windows.

    Bin-packing plans are cached under a hash of the document boundaries, ``block_size`` and ``policy``.
    """
    if policy == "concatenate":
        return ConcatenatedPlan(stream, block_size)
    shards = [(shard.sha256["documents"], shard.n_tokens) for shard in stream.shards]
    key = hash_json([PLAN_FORMAT, policy, block_size, shards])
    return CachedPlan(stream, block_size, policy, cache / "packing" / key[:16])


def compute_packing_cost(stream: TokenStream, block_size: int, policy: PackingPolicy) -> PackingCost:
    """Compute the cost of a packing policy without storing a plan."""
    if policy == "concatenate":
        return ConcatenatedPlan(stream, block_size).cost
    return sum((cost for _, _, cost in pack_shards(stream, block_size, policy)), PackingCost())


class ConcatenatedPlan:
    """Packing plan that splits a token stream every ``block_size`` tokens.

    Every token of the stream except the first is a label exactly once, unless its label is in a dropped last window.

    Args:
        stream: Token stream to pack.
        block_size: Tokens per window.
        keep_last: Whether to keep the last window if it is shorter than ``block_size``: True for validation, so that
            every token is scored; False for training, where all windows have the same weight.
    """

    crosses: ClassVar[bool] = True

    def __init__(self, stream: TokenStream, block_size: int, keep_last: bool = False) -> None:
        self.stream = stream
        self.block_size = block_size
        scored = max(stream.n_tokens - 1, 0)
        self.n_windows = -(-scored // block_size) if keep_last else scored // block_size

    def __len__(self) -> int:
        return self.n_windows

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """Return the start position and length of the single span of the stream that forms a window.

        The list is empty for an index past the last window.
        """
        start = window * self.block_size
        length = min(self.block_size, self.stream.n_tokens - start)
        return [(start, length)] if window < self.n_windows else []

    def count_labels(self, windows: Integers) -> int:
        """Count the labels in the windows with the given indices, an array of shape (n,)."""
        starts = windows * self.block_size
        return int(self.stream.count_labels(starts, np.full_like(starts, self.block_size)).sum())

    @cached_property
    def cost(self) -> PackingCost:
        """Packing cost of the plan, computed by iterating over all documents."""
        T, end = self.block_size, self.n_windows * self.block_size
        n_split = needlessly = crossing = 0
        last = -1  # last window that was counted as crossing
        for starts, lengths in self.stream.document_spans():
            split = (starts // T != (starts + lengths - 1) // T) & (starts < end)
            n_split += int(split.sum())
            needlessly += int((split & (lengths <= T)).sum())
            begun = np.unique(starts[(starts % T != 0) & (starts < end)] // T)
            crossing += len(begun) - int(len(begun) > 0 and begun[0] == last)
            last = int(begun[-1]) if len(begun) else last
        padding, discarded = max(end - self.stream.n_tokens, 0), max(self.stream.n_tokens - 1 - end, 0)
        return PackingCost(len(self), end, self.stream.n_documents, padding, discarded, n_split, needlessly, crossing)


class _BinPackingPlan(ABC):
    """Base class for plans stored as two arrays: the pieces, and the index of each window's first piece.

    A piece is a contiguous span of the stream. The pieces are in window order, so the pieces of a window are adjacent.
    """

    crosses: ClassVar[bool] = False
    stream: TokenStream

    @property
    @abstractmethod
    def _pieces(self) -> Integers:
        """Start position and length of each piece, int64 array of shape (n_pieces, 2)."""

    @property
    @abstractmethod
    def _windows(self) -> Integers:
        """Index of the first piece in each window, followed by ``n_pieces``; int64 array of shape (n_windows + 1,)."""

    def __len__(self) -> int:
        return len(self._windows) - 1

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """Return the start position and length of each piece (contiguous span of the stream) in a window.

        Pieces are in stream order. The list is empty for an index past the last window.
        """
        first, end = self._windows[window : window + 2] if window < len(self) else (0, 0)
        return [(int(start), int(length)) for start, length in self._pieces[first:end]]

    def count_labels(self, windows: Integers) -> int:
        """Count the labels in the windows with the given indices, an array of shape (n,)."""
        first = self._windows[windows]
        n = self._windows[windows + 1] - first
        # Index with the concatenation of the ranges first[i] .. first[i] + n[i] - 1, the pieces of each window.
        starts, lengths = self._pieces[np.repeat(first - np.cumsum(n) + n, n) + np.arange(n.sum())].T
        return int(self.stream.count_labels(starts, lengths).sum())


class InMemoryPlan(_BinPackingPlan):
    """Bin-packing plan that is kept in memory.

    Args:
        stream: Token stream to pack.
        block_size: Tokens per window.
        policy: Packing policy.
    """

    def __init__(self, stream: TokenStream, block_size: int, policy: BinPackingPolicy) -> None:
        self.stream = stream
        self._parts = list(pack_shards(stream, block_size, policy))

    @cached_property
    def cost(self) -> PackingCost:
        """Packing cost of the plan, summed over its shards."""
        return sum((cost for _, _, cost in self._parts), PackingCost())

    @cached_property
    def _pieces(self) -> Integers:
        return np.concatenate([pieces for pieces, _, _ in self._parts])

    @cached_property
    def _windows(self) -> Integers:
        return np.cumsum(np.concatenate([[0], *(piece_counts for _, piece_counts, _ in self._parts)]))


class CachedPlan(_BinPackingPlan, PicklableMemmaps):
    """Bin-packing plan that is computed once and memory-mapped from two files, ``pieces`` and ``windows``.

    Args:
        stream: Token stream to pack.
        block_size: Tokens per window.
        policy: Packing policy.
        folder: Folder for the plan's files; created if it does not exist.
    """

    def __init__(self, stream: TokenStream, block_size: int, policy: BinPackingPolicy, folder: Path) -> None:
        self.stream = stream
        self.folder = folder
        create_folder_atomically(folder, lambda target: _write_plan(stream, block_size, policy, target), "--data.cache")

    @cached_property
    def cost(self) -> PackingCost:
        """Packing cost, which was stored when the plan was computed."""
        path = self.folder / "cost.json"
        try:
            stored = read_json(path, dict[str, int])
            return validate({_FIELD_OF_KEY.get(key, key): value for key, value in stored.items()}, PackingCost)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is corrupted ({error}); delete {self.folder}") from error

    @property
    def _pieces(self) -> Integers:
        require_file_size(f"{self.folder}/pieces", self._mapped_pieces.nbytes)
        return self._mapped_pieces

    @property
    def _windows(self) -> Integers:
        require_file_size(f"{self.folder}/windows", self._mapped_windows.nbytes)
        return self._mapped_windows

    @cached_property
    def _mapped_pieces(self) -> Integers:
        return np.asarray(np.memmap(self.folder / "pieces", np.int64, "r")).reshape(-1, 2)

    @cached_property
    def _mapped_windows(self) -> Integers:
        return np.asarray(np.memmap(self.folder / "windows", np.int64, "r"))


_FIELD_OF_KEY: Final = {"cut": "split", "cut_needlessly": "split_needlessly"}
"""Map from ``cost.json`` keys (format 1) to ``PackingCost`` fields, for fields whose names differ from their keys."""
_KEY_OF_FIELD: Final = {field: key for key, field in _FIELD_OF_KEY.items()}


def _write_plan(stream: TokenStream, block_size: int, policy: BinPackingPolicy, folder: Path) -> None:
    """Write a plan shard by shard, so that only one shard's documents are in memory at a time."""
    n_pieces, total = 0, PackingCost()
    with (folder / "pieces").open("wb") as pieces_file, (folder / "windows").open("wb") as windows_file:
        windows_file.write(np.zeros(1, np.int64).tobytes())  # tofile() loses data silently if the disk is full
        for pieces, piece_counts, cost in pack_shards(stream, block_size, policy):
            pieces_file.write(pieces.tobytes())
            windows_file.write((n_pieces + np.cumsum(piece_counts)).tobytes())
            n_pieces += len(pieces)
            total += cost
    stored = {_KEY_OF_FIELD.get(field, field): value for field, value in asdict(total).items()}
    (folder / "cost.json").write_text(json.dumps(stored), encoding="utf-8")


def pack_shards(
    stream: TokenStream, block_size: int, policy: BinPackingPolicy
) -> Iterator[tuple[Integers, Integers, PackingCost]]:
    """Pack the documents of each shard.

    Yields:
        For each shard, the start position and length of each piece (contiguous span of the stream) in window order, of
        shape (n_pieces, 2); the number of pieces in each window, of shape (n_windows,); and the packing cost.
    """
    for starts, lengths in stream.document_spans():
        pieces = _split_documents(starts, lengths, block_size)
        window_of = best_fit_decreasing(pieces[:, 1], block_size) if policy == "best_fit" else np.arange(len(pieces))
        piece_counts = np.bincount(window_of)
        positions = len(piece_counts) * block_size
        padding, split, crossing = (
            positions - int(lengths.sum()),
            (lengths > block_size).sum(),
            (piece_counts > 1).sum(),
        )
        cost = PackingCost(len(piece_counts), positions, len(starts), padding, split=int(split), crossing=int(crossing))
        yield pieces[np.argsort(window_of, kind="stable")], piece_counts, cost


def _split_documents(starts: Integers, lengths: Integers, block_size: int) -> Integers:
    """Split each document into pieces of ``block_size`` tokens; the last piece of a document may be shorter.

    Returns:
        Start position and length of each piece, array of shape (n_pieces, 2).
    """
    n_pieces = -(-lengths // block_size)
    document = np.repeat(np.arange(len(starts)), n_pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)  # index within its document
    first = starts[document] + nth * block_size
    return np.stack([first, np.minimum(block_size, lengths[document] - nth * block_size)], axis=1)


def best_fit_decreasing(lengths: Integers, capacity: int) -> Integers:
    """Assign items to bins by best-fit-decreasing bin packing.

    Bins with equal free space are interchangeable, and so are items of equal length, so both are processed in groups.
    If the next item has the same length as the previous item and fits into the same bin, it also goes into that bin,
    which is still the fullest bin with enough free space.

    Args:
        lengths: Length of each item, from 1 to ``capacity``; array of shape (n,).
        capacity: Capacity of a bin.

    Returns:
        Bin index of each item, starting at 0; array of shape (n,).
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    open_bins: dict[int, list[int]] = {}  # bin indices, keyed by free space
    has_open = np.zeros(capacity + 1, dtype=bool)
    n_bins = done = 0
    for length, count in zip(*(values[::-1] for values in np.unique(lengths, return_counts=True)), strict=True):
        items = longest_first[done : done + count]
        done += count
        while len(items):
            space = int(length + np.argmax(has_open[length:]))
            if not has_open[space]:
                space = capacity
            per_bin = space // int(length)
            wanted = -(-len(items) // per_bin)
            if space < capacity:
                chosen = open_bins[space][-wanted:]
                del open_bins[space][-wanted:]
                has_open[space] = bool(open_bins[space])
            else:
                chosen = list(range(n_bins, n_bins + wanted))
                n_bins += wanted
            placed, items = items[: len(chosen) * per_bin], items[len(chosen) * per_bin :]
            bins[placed] = np.repeat(chosen, per_bin)[: len(placed)]
            full = len(placed) // per_bin
            for n_items, group in ((per_bin, chosen[:full]), (len(placed) % per_bin, chosen[full:])):
                if group and (left := space - n_items * int(length)):
                    open_bins.setdefault(left, []).extend(group)
                    has_open[left] = True
    return bins
