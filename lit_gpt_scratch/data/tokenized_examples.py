"""Tokenized examples, and the policies for examples that are too long."""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.errors import UserError

log = logging.getLogger(__name__)

LengthPolicy = Literal["refuse", "cut", "drop", "windows"]


class TextRecord(Protocol):
    """Interface of a record, which is parsed from one row of a table."""

    @property
    def texts(self) -> Sequence[str]:
        """Strings in the record, used to train a tokenizer and to find duplicates."""


@dataclass(frozen=True)
class EncodedSequence:
    """One token sequence with labels.

    Attributes:
        ids: Token ids, int64 array of shape (n,).
        labels: Label of each token, int64 array of shape (n,), where ``IGNORE_INDEX`` marks a token without a label; or
            the single label of the whole sequence, of shape (1,).
        label_bytes: Number of text bytes that each label represents, int64 array of shape (n,), or None if not counted.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    label_bytes: NDArray[np.int64] | None = None

    def truncate(self, n: int) -> "EncodedSequence":
        """Return the sequence truncated to its first ``n`` tokens."""
        label_bytes = None if self.label_bytes is None else self.label_bytes[:n]
        return EncodedSequence(self.ids[:n], self.labels[:n], label_bytes)

    @property
    def n_labels(self) -> int:
        """Number of labels that are not ignored."""
        return int((self.labels != IGNORE_INDEX).sum())


class TokenizedExample(NamedTuple):
    """A tokenized record: one sequence, or several that form one training example.

    Attributes:
        where: Location of the record's row, used in error messages.
        sequences: Sequences of the example; their number and meaning depend on the data module.
    """

    where: str
    sequences: tuple[EncodedSequence, ...]

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the longest sequence."""
        return max(len(sequence.ids) for sequence in self.sequences)

    @property
    def n_labels(self) -> int:
        """Total number of labels that are not ignored, over all sequences."""
        return sum(sequence.n_labels for sequence in self.sequences)

    def truncate(self, n: int) -> "TokenizedExample | None":
        """Truncate each sequence to at most ``n`` tokens. The label of a whole sequence is always kept.

        Returns:
            The truncated example, or None if a sequence would have no labels left or two sequences would become equal.
        """
        truncated = [sequence.truncate(n) for sequence in self.sequences]
        pairs = zip(self.sequences, truncated, strict=True)
        no_labels = any(whole.n_labels and not part.n_labels for whole, part in pairs)
        equal = len({part.ids.tobytes() for part in truncated}) < len(truncated)
        return None if no_labels or equal else TokenizedExample(self.where, tuple(truncated))


def hash_examples(examples: Sequence[TokenizedExample]) -> bytes:
    """Return the SHA-256 of the token ids and labels of all examples, in order."""
    sha256 = hashlib.sha256()
    for sequence in (sequence for example in examples for sequence in example.sequences):
        for part in (sequence.ids, sequence.labels):
            sha256.update(len(part).to_bytes(8, "little") + part.tobytes())
    return sha256.digest()


def limit_length(
    examples: Iterable[TokenizedExample], block_size: int, too_long: LengthPolicy, split: str
) -> list[TokenizedExample]:
    """Limit examples to ``block_size`` tokens: reject, truncate or drop longer examples, depending on ``too_long``.

    An example that cannot be truncated (see ``TokenizedExample.truncate``) is dropped.

    Raises:
        UserError: An example is too long and ``too_long`` is ``refuse``.
    """
    kept: list[TokenizedExample] = []
    n_truncated = n_dropped = 0
    for example in examples:
        n_tokens = example.n_tokens
        if n_tokens <= block_size:
            kept.append(example)
            continue
        if too_long == "refuse":
            raise UserError(
                f"{example.where} has {n_tokens:,} tokens, more than the maximum of {block_size:,}; raise "
                "--data.block_size, or set --data.too_long cut to truncate such records or --data.too_long drop to "
                "skip them"
            )
        if too_long == "cut" and (truncated := example.truncate(block_size)):
            kept.append(truncated)
            n_truncated += 1
        else:
            n_dropped += 1
    if n_truncated or n_dropped:
        log.warning(
            "%s: of %d records longer than %d tokens, %d were truncated and %d dropped",
            split,
            n_truncated + n_dropped,
            block_size,
            n_truncated,
            n_dropped,
        )
    return kept
