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

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.text.shards import Mapped, Stream
from lit_gpt_scratch.text.whole import whole_folder

Policy = Literal["concatenate", "best_fit", "one_document"]
POLICIES: Final[tuple[Policy, ...]] = get_args(Policy)

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Cost:
    """What a policy does to documents.

    Attributes:
        windows: Windows of ``block_size`` tokens.
        block_size: Tokens in a window.
        documents: Documents.
        padding: Positions without a token.
        discarded: Tokens that are in no window.
        cut: Documents that are in more than one window.
        cut_needlessly: Those of them that would fit into one.
        crossing: Windows with tokens of more than one document.
    """

    windows: int
    block_size: int
    documents: int
    padding: int
    discarded: int
    cut: int
    cut_needlessly: int
    crossing: int

    @property
    def used(self) -> float:
        """The share of the windows' positions that have a token."""
        return 1 - self.padding / max(self.windows * self.block_size, 1)


class Packing(Protocol):
    """A stream laid into windows.

    Attributes:
        stream: The tokens.
    """

    stream: Stream

    @property
    def cost(self) -> Cost:
        """What it took."""

    def __len__(self) -> int: ...

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """The stretches of the stream that make up a window: the first token of each, and how many."""


class Concatenated:
    """The stream cut every ``block_size`` tokens. Every token but the very first is a label exactly once.

    Args:
        stream: The tokens.
        block_size: Tokens in a window.
        whole: Keep the shorter last window, so that every token is scored (validation); else it is dropped (training,
            where all windows count alike).
    """

    def __init__(self, stream: Stream, block_size: int, whole: bool = False) -> None:
        self.stream = stream
        self.block_size = block_size
        scored = max(stream.n_tokens - 1, 0)
        self.n_windows = -(-scored // block_size) if whole else scored // block_size

    def __len__(self) -> int:
        return self.n_windows

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """One; none behind the last window."""
        start = window * self.block_size
        length = min(self.block_size, self.stream.n_tokens - start)
        return [(start, length)] if window < self.n_windows else []

    @cached_property
    def cost(self) -> Cost:
        """Found by walking over the documents."""
        T, end = self.block_size, self.n_windows * self.block_size
        cut = needlessly = crossing = 0
        last = -1  # the window last counted as crossing
        for starts, lengths in _documents(self.stream):
            parted = (starts // T != (starts + lengths - 1) // T) & (starts < end)
            cut += int(parted.sum())
            needlessly += int((parted & (lengths <= T)).sum())
            begun = np.unique(starts[(starts % T != 0) & (starts < end)] // T)
            crossing += len(begun) - int(len(begun) > 0 and begun[0] == last)
            last = int(begun[-1]) if len(begun) else last
        padding, discarded = max(end - self.stream.n_tokens, 0), max(self.stream.n_tokens - 1 - end, 0)
        return Cost(len(self), T, self.stream.n_documents, padding, discarded, cut, needlessly, crossing)


class Planned(Mapped):
    """Windows that were planned ahead: ``best_fit`` and ``one_document``.

    The plan is made once and mapped into memory: ``pieces.npy``, (n_pieces, 2) int64, in the order of the windows; and
    ``windows.npy``, (n_windows + 1,) int64, the first piece of each.

    Args:
        stream: The tokens.
        block_size: Tokens in a window.
        policy: Of the two.
        folder: Where the plan is, or will be.
    """

    def __init__(self, stream: Stream, block_size: int, policy: Policy, folder: Path) -> None:
        self.stream = stream
        self.folder = folder
        whole_folder(folder, lambda place: _plan(stream, block_size, policy, place), "--data.cache")

    def __len__(self) -> int:
        return len(self._windows) - 1

    @cached_property
    def cost(self) -> Cost:
        """As it was found when the plan was made."""
        return Cost(**json.loads((self.folder / "cost.json").read_text(encoding="utf-8")))

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """In the order of the stream."""
        first, behind = self._windows[window : window + 2]
        return [(int(start), int(length)) for start, length in self._pieces[first:behind]]

    @cached_property
    def _pieces(self) -> Integers:
        return np.asarray(np.load(self.folder / "pieces.npy", mmap_mode="r"))

    @cached_property
    def _windows(self) -> Integers:
        return np.asarray(np.load(self.folder / "windows.npy", mmap_mode="r"))


def packed(stream: Stream, block_size: int, policy: Policy, cache: Path) -> Packing:
    """A stream laid into windows for training; a plan is kept in the cache, under what it is made for."""
    if policy == "concatenate":
        return Concatenated(stream, block_size)
    planned_for = [policy, block_size, *(shard.sha256["documents"] for shard in stream.shards)]
    key = hashlib.sha256(json.dumps(planned_for).encode()).hexdigest()
    return Planned(stream, block_size, policy, cache / "packing" / key[:16])


def _documents(stream: Stream) -> Iterator[tuple[Integers, Integers]]:
    """Of each shard, the first token of its documents, counted through the stream, and how many each has."""
    for shard, end in zip(stream.shards, stream.ends, strict=True):
        starts = shard.documents[:, 0].astype(np.int64)
        yield starts + end - shard.n_tokens, np.diff(starts, append=shard.n_tokens)


def _plan(stream: Stream, block_size: int, policy: Policy, folder: Path) -> None:
    """Plan shard by shard, so that it takes memory for the documents of one."""
    parts, firsts, n_pieces, n_windows, cut, crossing = [], [np.zeros(1, np.int64)], 0, 0, 0, 0
    for starts, lengths in _documents(stream):
        pieces = _cut(starts, lengths, block_size)
        windows = best_fit(pieces[:, 1], block_size) if policy == "best_fit" else np.arange(len(pieces))
        parts.append(pieces[np.argsort(windows, kind="stable")])
        in_each = np.bincount(windows)
        firsts.append(n_pieces + np.cumsum(in_each))
        n_pieces += len(pieces)
        n_windows += len(in_each)
        cut += int((lengths > block_size).sum())
        crossing += int((in_each > 1).sum())
    np.save(folder / "pieces.npy", np.concatenate(parts))
    np.save(folder / "windows.npy", np.concatenate(firsts))
    padding = n_windows * block_size - stream.n_tokens
    cost = Cost(n_windows, block_size, stream.n_documents, padding, 0, cut, 0, crossing)
    (folder / "cost.json").write_text(json.dumps(asdict(cost)), encoding="utf-8")


def _cut(starts: Integers, lengths: Integers, block_size: int) -> Integers:
    """Documents as pieces of ``block_size`` tokens and a rest: (n_pieces, 2), first token and length."""
    n_pieces = -(-lengths // block_size)
    document = np.repeat(np.arange(len(starts)), n_pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)  # of its document
    first = starts[document] + nth * block_size
    return np.stack([first, np.minimum(block_size, lengths[document] - nth * block_size)], axis=1)


def best_fit(lengths: Integers, capacity: int) -> Integers:
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
