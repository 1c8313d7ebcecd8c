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
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.data.bin_packing import best_fit
from lit_gpt_scratch.data.token_store import fingerprint
from lit_gpt_scratch.text.shards import Mapped, Stream
from lit_gpt_scratch.text.whole import whole_folder

Policy = Literal["concatenate", "best_fit", "one_document"]
POLICIES: Final[tuple[Policy, ...]] = get_args(Policy)

PLAN: Final = 1
"""Number of the form in which plans are kept."""

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Cost:
    """What a policy does to documents; costs can be added.

    Attributes:
        windows: How many there are.
        positions: Tokens that they have room for.
        documents: Documents.
        padding: Positions without a token.
        discarded: Tokens that are in no window.
        cut: Documents that are not in one window alone.
        cut_needlessly: Those of them that would fit into one.
        crossing: Windows with tokens of more than one document.
    """

    windows: int = 0
    positions: int = 0
    documents: int = 0
    padding: int = 0
    discarded: int = 0
    cut: int = 0
    cut_needlessly: int = 0
    crossing: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def used(self) -> float:
        """The share of the positions that have a token."""
        return 1 - self.padding / max(self.positions, 1)

    HEAD: ClassVar = (
        "windows",
        "positions used",
        "tokens discarded",
        "documents cut",
        "needlessly",
        "windows crossing",
    )

    @property
    def row(self) -> list[str]:
        """For a table under ``HEAD``."""
        documents, windows = max(self.documents, 1), max(self.windows, 1)
        shares = self.cut / documents, self.cut_needlessly / documents, self.crossing / windows
        return [f"{self.windows:,}", f"{self.used:.2%}", f"{self.discarded:,}", *(f"{share:.1%}" for share in shares)]


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
        return Cost(len(self), end, self.stream.n_documents, padding, discarded, cut, needlessly, crossing)


class Planned(Mapped):
    """Windows that were planned ahead: ``best_fit`` and ``one_document``.

    The plan is made once and mapped into memory, two files of int64: ``pieces``, (n_pieces, 2), in the order of the
    windows; and ``windows``, (n_windows + 1,), the first piece of each.

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
        return [(int(start), int(length)) for start, length in self._pieces[2 * first : 2 * behind].reshape(-1, 2)]

    @cached_property
    def _pieces(self) -> Integers:
        return np.asarray(np.memmap(self.folder / "pieces", np.int64, "r"))

    @cached_property
    def _windows(self) -> Integers:
        return np.asarray(np.memmap(self.folder / "windows", np.int64, "r"))


def packed(stream: Stream, block_size: int, policy: Policy, cache: Path) -> Packing:
    """A stream laid into windows for training; a plan is kept in the cache, under what it is made for."""
    if policy == "concatenate":
        return Concatenated(stream, block_size)
    shards = [(shard.sha256["documents"], shard.n_tokens) for shard in stream.shards]
    key = fingerprint([PLAN, policy, block_size, shards])
    return Planned(stream, block_size, policy, cache / "packing" / key[:16])


def cost(stream: Stream, block_size: int, policy: Policy) -> Cost:
    """What a policy would cost, without a plan to keep."""
    if policy == "concatenate":
        return Concatenated(stream, block_size).cost
    return sum((found for _, _, found in _laid(stream, block_size, policy)), Cost())


def _plan(stream: Stream, block_size: int, policy: Policy, folder: Path) -> None:
    """Shard by shard, so that it takes memory for the documents of one."""
    n_pieces, total = 0, Cost()
    with (folder / "pieces").open("wb") as pieces_file, (folder / "windows").open("wb") as windows_file:
        np.zeros(1, np.int64).tofile(windows_file)
        for pieces, in_each, found in _laid(stream, block_size, policy):
            pieces.tofile(pieces_file)
            (n_pieces + np.cumsum(in_each)).tofile(windows_file)
            n_pieces += len(pieces)
            total += found
    (folder / "cost.json").write_text(json.dumps(asdict(total)), encoding="utf-8")


def _laid(stream: Stream, block_size: int, policy: Policy) -> Iterator[tuple[Integers, Integers, Cost]]:
    """Of each shard its pieces in the order of the windows, how many pieces each window has, and the cost."""
    for starts, lengths in _documents(stream):
        pieces = _cut(starts, lengths, block_size)
        windows = best_fit(pieces[:, 1], block_size) if policy == "best_fit" else np.arange(len(pieces))
        in_each = np.bincount(windows)
        positions = len(in_each) * block_size
        padding, cut, crossing = positions - int(lengths.sum()), (lengths > block_size).sum(), (in_each > 1).sum()
        found = Cost(len(in_each), positions, len(starts), padding, cut=int(cut), crossing=int(crossing))
        yield pieces[np.argsort(windows, kind="stable")], in_each, found


def _documents(stream: Stream) -> Iterator[tuple[Integers, Integers]]:
    """Of each shard, the first token of its documents, counted through the stream, and how many each has."""
    for shard, end in zip(stream.shards, stream.ends, strict=True):
        starts = shard.documents[:, 0].astype(np.int64)
        yield starts + end - shard.n_tokens, np.diff(starts, append=shard.n_tokens)


def _cut(starts: Integers, lengths: Integers, block_size: int) -> Integers:
    """Documents as pieces of ``block_size`` tokens and a rest: (n_pieces, 2), first token and length."""
    n_pieces = -(-lengths // block_size)
    document = np.repeat(np.arange(len(starts)), n_pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)  # of its document
    first = starts[document] + nth * block_size
    return np.stack([first, np.minimum(block_size, lengths[document] - nth * block_size)], axis=1)
