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

from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol, get_args

import numpy as np

from lit_gpt_scratch.data.packing_cost import Cost
from lit_gpt_scratch.data.plans import PLAN, Planned, laid
from lit_gpt_scratch.data.token_store import fingerprint
from lit_gpt_scratch.data.tokens import Tokens
from lit_gpt_scratch.text.shards import Stream

Policy = Literal["concatenate", "best_fit", "one_document"]
POLICIES: Final[tuple[Policy, ...]] = get_args(Policy)


class Packing(Protocol):
    """A stream laid into windows.

    Attributes:
        crosses: Whether a piece can go on from one document into the next.
    """

    crosses: ClassVar[bool]

    @property
    def stream(self) -> Tokens:
        """The tokens."""

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

    crosses: ClassVar[bool] = True

    def __init__(self, stream: Tokens, block_size: int, whole: bool = False) -> None:
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
        for starts, lengths in self.stream.documents():
            parted = (starts // T != (starts + lengths - 1) // T) & (starts < end)
            cut += int(parted.sum())
            needlessly += int((parted & (lengths <= T)).sum())
            begun = np.unique(starts[(starts % T != 0) & (starts < end)] // T)
            crossing += len(begun) - int(len(begun) > 0 and begun[0] == last)
            last = int(begun[-1]) if len(begun) else last
        padding, discarded = max(end - self.stream.n_tokens, 0), max(self.stream.n_tokens - 1 - end, 0)
        return Cost(len(self), end, self.stream.n_documents, padding, discarded, cut, needlessly, crossing)


def packed(stream: Stream, block_size: int, policy: Policy, cache: Path) -> Packing:
    """A stream laid into windows for training; a plan is kept in the cache, under what it is made for."""
    if policy == "concatenate":
        return Concatenated(stream, block_size)
    shards = [(shard.sha256["documents"], shard.n_tokens) for shard in stream.shards]
    key = fingerprint([PLAN, policy, block_size, shards])
    return Planned(stream, block_size, policy, cache / "packing" / key[:16])


def cost(stream: Tokens, block_size: int, policy: Policy) -> Cost:
    """What a policy would cost, without a plan to keep."""
    if policy == "concatenate":
        return Concatenated(stream, block_size).cost
    return sum((found for _, _, found in laid(stream, block_size, policy)), Cost())
