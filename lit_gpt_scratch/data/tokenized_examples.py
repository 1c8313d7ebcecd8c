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

LengthPolicy = Literal["refuse", "cut", "drop"]
LENGTH_POLICIES: Final[tuple[LengthPolicy, ...]] = get_args(LengthPolicy)


class TextRecord(Protocol):
    """What a row says."""

    @property
    def texts(self) -> Sequence[str]:
        """Its texts: what a tokenizer learns from, and what copies agree in."""


@dataclass(frozen=True)
class EncodedSequence:
    """Tokens that a model reads at once.

    Attributes:
        ids: (n,) int64.
        labels: (n,) int64, what is to be predicted at each, or ``IGNORE_INDEX``; or (1,), what is to be said of all.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]

    def truncate(self, n: int) -> "EncodedSequence":
        """The first so many tokens."""
        return EncodedSequence(self.ids[:n], self.labels[:n])

    @property
    def n_labels(self) -> int:
        """Labels that count."""
        return int((self.labels != IGNORE_INDEX).sum())


class TokenizedExample(NamedTuple):
    """A record as tokens: one sequence, or several that are learned from together.

    Attributes:
        where: The place of its row, for a message.
        sequences: As the stage needs them.
    """

    where: str
    sequences: tuple[EncodedSequence, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens of its longest sequence."""
        return max(len(sequence.ids) for sequence in self.sequences)

    @property
    def n_labels(self) -> int:
        """Labels that count."""
        return sum(sequence.n_labels for sequence in self.sequences)

    def truncate(self, n: int) -> "TokenizedExample | None":
        """With no sequence longer than so many tokens; None if one loses all its labels, or what tells it from another.

        The label of a whole sequence is never lost.
        """
        cut = [sequence.truncate(n) for sequence in self.sequences]
        lost = any(whole.n_labels and not part.n_labels for whole, part in zip(self.sequences, cut, strict=True))
        same = len({part.ids.tobytes() for part in cut}) < len(cut)
        return None if lost or same else TokenizedExample(self.where, tuple(cut))


class ExampleCounts(NamedTuple):
    """What is on a side: records, the tokens that a model reads of them, and the labels that count."""

    records: int
    tokens: int
    labels: int

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample]) -> "ExampleCounts":
        """Count them."""
        tokens = sum(len(sequence.ids) for example in examples for sequence in example.sequences)
        return cls(len(examples), tokens, sum(example.n_labels for example in examples))


def hash_examples(examples: Sequence[TokenizedExample]) -> bytes:
    """SHA-256 of ids and labels, in their order."""
    found = hashlib.sha256()
    for sequence in (sequence for example in examples for sequence in example.sequences):
        for part in (sequence.ids, sequence.labels):
            found.update(len(part).to_bytes(8, "little") + part.tobytes())
    return found.digest()


def limit_length(
    examples: Iterable[TokenizedExample], block_size: int, too_long: LengthPolicy, side: str
) -> list[TokenizedExample]:
    """Examples of at most ``block_size`` tokens.

    What is cut so that nothing is left to learn from it is dropped.

    Raises:
        UserError: One is longer, and is to be refused.
    """
    found: list[TokenizedExample] = []
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
        if too_long == "cut" and (cut := example.truncate(block_size)):
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
