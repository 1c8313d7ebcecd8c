"""Windows that are planned ahead: which piece of which document goes into which window."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final, Literal

import numpy as np

from lit_gpt_scratch.data.bin_packing import best_fit
from lit_gpt_scratch.data.packing_cost import Cost
from lit_gpt_scratch.data.tokens import Integers, Tokens
from lit_gpt_scratch.text.shards import Mapped
from lit_gpt_scratch.text.whole import whole_folder

PLAN: Final = 1
"""Number of the form in which plans are kept."""

PlannedPolicy = Literal["best_fit", "one_document"]


class _Plan(ABC):
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


class Laid(_Plan):
    """A plan in memory.

    Args:
        stream: The tokens.
        block_size: Tokens in a window.
        policy: How documents are laid.
    """

    def __init__(self, stream: Tokens, block_size: int, policy: PlannedPolicy) -> None:
        self.stream = stream
        self._parts = list(laid(stream, block_size, policy))

    @cached_property
    def cost(self) -> Cost:
        """What it took."""
        return sum((found for _, _, found in self._parts), Cost())

    @cached_property
    def _pieces(self) -> Integers:
        return np.concatenate([pieces for pieces, _, _ in self._parts])

    @cached_property
    def _windows(self) -> Integers:
        return np.cumsum(np.concatenate([[0], *(in_each for _, in_each, _ in self._parts)]))


class Planned(_Plan, Mapped):
    """A plan that is made once and mapped into memory from two files, ``pieces`` and ``windows``.

    Args:
        stream: The tokens.
        block_size: Tokens in a window.
        policy: How documents are laid.
        folder: Where the plan is, or will be.
    """

    def __init__(self, stream: Tokens, block_size: int, policy: PlannedPolicy, folder: Path) -> None:
        self.stream = stream
        self.folder = folder
        whole_folder(folder, lambda place: _plan(stream, block_size, policy, place), "--data.cache")

    @cached_property
    def cost(self) -> Cost:
        """As it was found when the plan was made."""
        return Cost(**json.loads((self.folder / "cost.json").read_text(encoding="utf-8")))

    @cached_property
    def _pieces(self) -> Integers:
        return np.asarray(np.memmap(self.folder / "pieces", np.int64, "r")).reshape(-1, 2)

    @cached_property
    def _windows(self) -> Integers:
        return np.asarray(np.memmap(self.folder / "windows", np.int64, "r"))


def _plan(stream: Tokens, block_size: int, policy: PlannedPolicy, folder: Path) -> None:
    """Shard by shard, so that it takes memory for the documents of one."""
    n_pieces, total = 0, Cost()
    with (folder / "pieces").open("wb") as pieces_file, (folder / "windows").open("wb") as windows_file:
        np.zeros(1, np.int64).tofile(windows_file)
        for pieces, in_each, found in laid(stream, block_size, policy):
            pieces.tofile(pieces_file)
            (n_pieces + np.cumsum(in_each)).tofile(windows_file)
            n_pieces += len(pieces)
            total += found
    (folder / "cost.json").write_text(json.dumps(asdict(total)), encoding="utf-8")


def laid(stream: Tokens, block_size: int, policy: PlannedPolicy) -> Iterator[tuple[Integers, Integers, Cost]]:
    """Of each shard its pieces in the order of the windows, how many pieces each window has, and the cost."""
    for starts, lengths in stream.documents():
        pieces = _cut(starts, lengths, block_size)
        windows = best_fit(pieces[:, 1], block_size) if policy == "best_fit" else np.arange(len(pieces))
        in_each = np.bincount(windows)
        positions = len(in_each) * block_size
        padding, cut, crossing = positions - int(lengths.sum()), (lengths > block_size).sum(), (in_each > 1).sum()
        found = Cost(len(in_each), positions, len(starts), padding, cut=int(cut), crossing=int(crossing))
        yield pieces[np.argsort(windows, kind="stable")], in_each, found


def _cut(starts: Integers, lengths: Integers, block_size: int) -> Integers:
    """Documents as pieces of ``block_size`` tokens and a rest: (n_pieces, 2), first token and length."""
    n_pieces = -(-lengths // block_size)
    document = np.repeat(np.arange(len(starts)), n_pieces)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)  # of its document
    first = starts[document] + nth * block_size
    return np.stack([first, np.minimum(block_size, lengths[document] - nth * block_size)], axis=1)
