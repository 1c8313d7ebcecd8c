"""How documents are laid into windows of T tokens.

A window is a row of pieces, a piece a stretch of the stream: its tokens are the inputs, the tokens one further the
labels. So whatever the policy, a document's last token has the end of text to predict, and what follows in the window
is no label of it. Which pieces, and at what cost, is the policy's to say:

``concatenate``   one piece a window, the stream cut every T tokens: nothing is padded, documents are cut anywhere
``best_fit``      documents longer than T are cut into pieces of T and a rest; each piece, the longest first, goes into
                  the window that it leaves the least room in (Ding et al. 2024, https://arxiv.org/abs/2404.10830): no
                  document is cut that fits
``one_document``  the same pieces, each in a window of its own
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol, get_args

import numpy as np

from lit_gpt_scratch.data.token_store import hash_json
from lit_gpt_scratch.data.token_stream import Integers, TokenStream
from lit_gpt_scratch.text.atomic_files import create_folder_atomically
from lit_gpt_scratch.text.token_shards import PicklableMemmaps, ShardedTokenStream


@dataclass(frozen=True)
class PackingCost:
    """What a policy does to documents; costs can be added.

    Attributes:
        windows: How many there are.
        positions: Tokens that they have room for.
        documents: Documents.
        padding: Positions without a token.
        discarded: Tokens that are in no window.
        cut: Documents that are not in one window alone.
        split_needlessly: Those of them that would fit into one.
        crossing: Windows with tokens of more than one document.
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
        """The share of the positions that have a token."""
        return 1 - self.padding / max(self.positions, 1)

    TABLE_HEADER: ClassVar = (
        "windows",
        "positions used",
        "tokens discarded",
        "documents cut",
        "needlessly",
        "windows crossing",
    )

    @property
    def table_row(self) -> list[str]:
        """For a table under ``TABLE_HEADER``."""
        documents, windows = max(self.documents, 1), max(self.windows, 1)
        shares = self.split / documents, self.split_needlessly / documents, self.crossing / windows
        return [f"{self.windows:,}", f"{self.used:.2%}", f"{self.discarded:,}", *(f"{share:.1%}" for share in shares)]


def best_fit_decreasing(lengths: Integers, capacity: int) -> Integers:
    """Best-fit decreasing: which bin each item goes into.

    Bins with the same room are alike, and so are items of the same length, so both are dealt with together: as long as
    an item fits into what it has left of a bin, that bin has the least room that fits, and takes the next one, too.

    Args:
        lengths: (n,), each 1 to ``capacity``.
        capacity: Of a bin.

    Returns:
        (n,), the number of its bin, from 0.
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    open_bins: dict[int, list[int]] = {}  # by the room they have left
    has_open = np.zeros(capacity + 1, dtype=bool)
    n_bins = done = 0
    for length, count in zip(*(found[::-1] for found in np.unique(lengths, return_counts=True)), strict=True):
        items = longest_first[done : done + count]
        done += count
        while len(items):
            room = int(length + np.argmax(has_open[length:]))
            if not has_open[room]:
                room = capacity
            each = room // int(length)
            wanted = -(-len(items) // each)
            if room < capacity:
                chosen = open_bins[room][-wanted:]
                del open_bins[room][-wanted:]
                has_open[room] = bool(open_bins[room])
            else:
                chosen = list(range(n_bins, n_bins + wanted))
                n_bins += wanted
            now, items = items[: len(chosen) * each], items[len(chosen) * each :]
            bins[now] = np.repeat(chosen, each)[: len(now)]
            full = len(now) // each
            for taken, some in ((each, chosen[:full]), (len(now) % each, chosen[full:])):
                if some and (left := room - taken * int(length)):
                    open_bins.setdefault(left, []).extend(some)
                    has_open[left] = True
    return bins


PLAN_FORMAT: Final = 1
"""Number of the form in which plans are kept."""

BinPackingPolicy = Literal["best_fit", "one_document"]


class _ArrayPlan(ABC):
    """Two arrays: the pieces, in the order of the windows, and where those of each window begin."""

    crosses: ClassVar[bool] = False

    @cached_property
    @abstractmethod
    def _pieces(self) -> Integers:
        """(n_pieces, 2) int64, the first token of each and its length."""

    @cached_property
    @abstractmethod
    def _windows(self) -> Integers:
        """(n_windows + 1,) int64, the first piece of each."""

    def __len__(self) -> int:
        return len(self._windows) - 1

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """In the order of the stream; none behind the last window."""
        first, behind = self._windows[window : window + 2] if window < len(self) else (0, 0)
        return [(int(start), int(length)) for start, length in self._pieces[first:behind]]


class InMemoryPlan(_ArrayPlan):
    """A plan in memory.

    Args:
        stream: The tokens.
        block_size: Tokens in a window.
        policy: How documents are laid.
    """

    def __init__(self, stream: TokenStream, block_size: int, policy: BinPackingPolicy) -> None:
        self.stream = stream
        self._parts = list(pack_shards(stream, block_size, policy))

    @cached_property
    def cost(self) -> PackingCost:
        """What it took."""
        return sum((found for _, _, found in self._parts), PackingCost())

    @cached_property
    def _pieces(self) -> Integers:
        return np.concatenate([pieces for pieces, _, _ in self._parts])

    @cached_property
    def _windows(self) -> Integers:
        return np.cumsum(np.concatenate([[0], *(in_each for _, in_each, _ in self._parts)]))


class CachedPlan(_ArrayPlan, PicklableMemmaps):
    """A plan that is made once and mapped into memory from two files, ``pieces`` and ``windows``.

    Args:
        stream: The tokens.
        block_size: Tokens in a window.
        policy: How documents are laid.
        folder: Where the plan is, or will be.
    """

    def __init__(self, stream: TokenStream, block_size: int, policy: BinPackingPolicy, folder: Path) -> None:
        self.stream = stream
        self.folder = folder
        create_folder_atomically(folder, lambda place: _write_plan(stream, block_size, policy, place), "--data.cache")

    @cached_property
    def cost(self) -> PackingCost:
        """As it was found when the plan was made."""
        return PackingCost(**json.loads((self.folder / "cost.json").read_text(encoding="utf-8")))

    @cached_property
    def _pieces(self) -> Integers:
        return np.asarray(np.memmap(self.folder / "pieces", np.int64, "r")).reshape(-1, 2)

    @cached_property
    def _windows(self) -> Integers:
        return np.asarray(np.memmap(self.folder / "windows", np.int64, "r"))


def _write_plan(stream: TokenStream, block_size: int, policy: BinPackingPolicy, folder: Path) -> None:
    """Shard by shard, so that it takes memory for the documents of one."""
    n_pieces, total = 0, PackingCost()
    with (folder / "pieces").open("wb") as pieces_file, (folder / "windows").open("wb") as windows_file:
        np.zeros(1, np.int64).tofile(windows_file)
        for pieces, in_each, found in pack_shards(stream, block_size, policy):
            pieces.tofile(pieces_file)
            (n_pieces + np.cumsum(in_each)).tofile(windows_file)
            n_pieces += len(pieces)
            total += found
    (folder / "cost.json").write_text(json.dumps(asdict(total)), encoding="utf-8")


def pack_shards(
    stream: TokenStream, block_size: int, policy: BinPackingPolicy
) -> Iterator[tuple[Integers, Integers, PackingCost]]:
    """Of each shard its pieces in the order of the windows, how many pieces each window has, and the cost."""
    for starts, lengths in stream.document_spans():
        pieces = _split_documents(starts, lengths, block_size)
        windows = best_fit_decreasing(pieces[:, 1], block_size) if policy == "best_fit" else np.arange(len(pieces))
        in_each = np.bincount(windows)
        positions = len(in_each) * block_size
        padding, cut, crossing = positions - int(lengths.sum()), (lengths > block_size).sum(), (in_each > 1).sum()
        found = PackingCost(len(in_each), positions, len(starts), padding, split=int(cut), crossing=int(crossing))
        yield pieces[np.argsort(windows, kind="stable")], in_each, found


def _split_documents(starts: Integers, lengths: Integers, block_size: int) -> Integers:
    """Documents as pieces of ``block_size`` tokens and a rest: (n_pieces, 2), first token and length."""
    n_pieces = -(-lengths // block_size)
    document = np.repeat(np.arange(len(starts)), n_pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)  # of its document
    first = starts[document] + nth * block_size
    return np.stack([first, np.minimum(block_size, lengths[document] - nth * block_size)], axis=1)


PackingPolicy = Literal["concatenate", "best_fit", "one_document"]
PACKING_POLICIES: Final[tuple[PackingPolicy, ...]] = get_args(PackingPolicy)


class PackingPlan(Protocol):
    """A stream laid into windows.

    Attributes:
        crosses: Whether a piece can go on from one document into the next.
    """

    crosses: ClassVar[bool]

    @property
    def stream(self) -> TokenStream:
        """The tokens."""

    @property
    def cost(self) -> PackingCost:
        """What it took."""

    def __len__(self) -> int: ...

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """The stretches of the stream that make up a window: the first token of each, and how many."""


class ConcatenatedPlan:
    """The stream cut every ``block_size`` tokens. Every token but the very first is a label exactly once.

    Args:
        stream: The tokens.
        block_size: Tokens in a window.
        keep_last: Keep the shorter last window, so that every token is scored (validation); else drop it (training,
            where all windows count alike).
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
        """One; none behind the last window."""
        start = window * self.block_size
        length = min(self.block_size, self.stream.n_tokens - start)
        return [(start, length)] if window < self.n_windows else []

    @cached_property
    def cost(self) -> PackingCost:
        """Found by walking over the documents."""
        T, end = self.block_size, self.n_windows * self.block_size
        cut = needlessly = crossing = 0
        last = -1  # the window last counted as crossing
        for starts, lengths in self.stream.document_spans():
            parted = (starts // T != (starts + lengths - 1) // T) & (starts < end)
            cut += int(parted.sum())
            needlessly += int((parted & (lengths <= T)).sum())
            begun = np.unique(starts[(starts % T != 0) & (starts < end)] // T)
            crossing += len(begun) - int(len(begun) > 0 and begun[0] == last)
            last = int(begun[-1]) if len(begun) else last
        padding, discarded = max(end - self.stream.n_tokens, 0), max(self.stream.n_tokens - 1 - end, 0)
        return PackingCost(len(self), end, self.stream.n_documents, padding, discarded, cut, needlessly, crossing)


def plan_packing(stream: ShardedTokenStream, block_size: int, policy: PackingPolicy, cache: Path) -> PackingPlan:
    """A stream laid into windows for training; a plan is kept in the cache, under what it is made for."""
    if policy == "concatenate":
        return ConcatenatedPlan(stream, block_size)
    shards = [(shard.sha256["documents"], shard.n_tokens) for shard in stream.shards]
    key = hash_json([PLAN_FORMAT, policy, block_size, shards])
    return CachedPlan(stream, block_size, policy, cache / "packing" / key[:16])


def compute_packing_cost(stream: TokenStream, block_size: int, policy: PackingPolicy) -> PackingCost:
    """What a policy would cost, without a plan to keep."""
    if policy == "concatenate":
        return ConcatenatedPlan(stream, block_size).cost
    return sum((found for _, _, found in pack_shards(stream, block_size, policy)), PackingCost())
