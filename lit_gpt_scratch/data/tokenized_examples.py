"""Records, their tokens, and what becomes of those that are too long."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.errors import UserError

log = logging.getLogger(__name__)

TooLong = Literal["refuse", "cut", "drop"]
TOO_LONG: Final[tuple[TooLong, ...]] = get_args(TooLong)


class Record(Protocol):
    """What a row says."""

    @property
    def texts(self) -> Sequence[str]:
        """Its texts: what a tokenizer learns from, and what copies agree in."""


@dataclass(frozen=True)
class Encoded:
    """Tokens that a model reads at once.

    Attributes:
        ids: (n,) int64.
        labels: (n,) int64, what is to be predicted at each, or ``IGNORE_INDEX``; or (1,), what is to be said of all.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]

    def cut(self, n: int) -> "Encoded":
        """The first so many tokens."""
        return Encoded(self.ids[:n], self.labels[:n])

    @property
    def n_labels(self) -> int:
        """Labels that count."""
        return int((self.labels != IGNORE_INDEX).sum())


class Example(NamedTuple):
    """A record as tokens: one sequence, or several that are learned from together.

    Attributes:
        where: The place of its row, for a message.
        sequences: As the stage needs them.
    """

    where: str
    sequences: tuple[Encoded, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of its longest sequence."""
        return max(len(sequence.ids) for sequence in self.sequences)

    @property
    def n_labels(self) -> int:
        """Labels that count."""
        return sum(sequence.n_labels for sequence in self.sequences)

    def cut(self, n: int) -> "Example | None":
        """With no sequence longer than so many tokens; None if one loses all its labels, or what tells it from another.

        The label of a whole sequence is never lost.
        """
        cut = [sequence.cut(n) for sequence in self.sequences]
        lost = any(whole.n_labels and not part.n_labels for whole, part in zip(self.sequences, cut, strict=True))
        same = len({part.ids.tobytes() for part in cut}) < len(cut)
        return None if lost or same else Example(self.where, tuple(cut))


class Count(NamedTuple):
    """What is on a side: records, the tokens that a model reads of them, and the labels that count."""

    records: int
    tokens: int
    labels: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Count":
        """Count them."""
        tokens = sum(len(sequence.ids) for example in examples for sequence in example.sequences)
        return cls(len(examples), tokens, sum(example.n_labels for example in examples))


def digest(examples: Sequence[Example]) -> bytes:
    """SHA-256 of ids and labels, in their order."""
    found = hashlib.sha256()
    for sequence in (sequence for example in examples for sequence in example.sequences):
        for part in (sequence.ids, sequence.labels):
            found.update(len(part).to_bytes(8, "little") + part.tobytes())
    return found.digest()


def fitted(examples: Iterable[Example], block_size: int, too_long: TooLong, side: str) -> list[Example]:
    """Examples of at most ``block_size`` tokens.

    What is cut so that nothing is left to learn from it is dropped.

    Raises:
        UserError: One is longer, and is to be refused.
    """
    found: list[Example] = []
    n_cut = n_dropped = 0
    for example in examples:
        n_tokens = example.n_tokens
        if n_tokens <= block_size:
            found.append(example)
            continue
        if too_long == "refuse":
            raise UserError(
                f"{example.where} has {n_tokens:,} tokens, more than a row has room for: {block_size:,}; raise "
                "--data.block_size, or cut or drop such records: --data.too_long cut"
            )
        if too_long == "cut" and (cut := example.cut(block_size)):
            found.append(cut)
            n_cut += 1
        else:
            n_dropped += 1
    if n_cut or n_dropped:
        log.warning(
            "%s: of %d records longer than %d tokens %d were cut and %d dropped",
            side,
            n_cut + n_dropped,
            block_size,
            n_cut,
            n_dropped,
        )
    return found
