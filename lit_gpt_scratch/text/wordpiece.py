"""WordPiece training as originally described: each merge maximizes the likelihood, not the pair frequency."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm


def train_wordpiece(
    words: Mapping[str, int], alphabet: Iterable[str], size: int, min_count: int | None = None, prefix: str = "##"
) -> list[str]:
    """Train a WordPiece vocabulary, and return its tokens (pieces) in the order in which they were added.

    Each step merges the adjacent pieces ``a`` and ``b`` with the highest score ``count(ab) / (count(a) * count(b))``,
    because this merge most increases the likelihood of a unigram model over pieces (Schuster and Nakajima 2012,
    Japanese and Korean Voice Search; the score is from the Hugging Face course). If several pairs have the highest
    score, the pair that occurs first in the words is merged.

    Args:
        words: Number of occurrences of each word.
        alphabet: Characters that are always included, both as the start and as the continuation of a word.
        size: Maximum number of pieces.
        min_count: Minimum number of occurrences for a pair to be merged. Without a minimum, the score would favor pairs
            that occur only once. If None, the minimum starts at the count of the most frequent pair and is halved, down
            to 2, whenever no pair reaches it.
        prefix: Prefix of pieces that continue a word; it must not occur in a word.
    """
    pieces = {piece: None for symbol in alphabet for piece in (symbol, prefix + symbol)}
    pieces |= {piece: None for word in words for piece in _split_word(word, prefix)}
    counts = _PairCounts(words, list(pieces), prefix)
    bound = min_count or counts.count_of_pair.values.max(initial=2)
    initial = len(counts.pieces)
    with tqdm(total=size, initial=initial, desc="pieces", unit="", delay=2, leave=False, disable=None) as progress:
        while len(counts.pieces) < size:
            if counts.merge_best(bound):
                progress.update()
            elif min_count or bound <= 2:
                break
            else:
                bound = max(2, bound // 2)
    return counts.pieces


def _split_word(word: str, prefix: str) -> Iterator[str]:
    yield word[0]
    yield from (prefix + letter for letter in word[1:])


class _PairCounts:
    """Words as sequences of pieces, with up-to-date counts of pieces and adjacent pairs."""

    def __init__(self, words: Mapping[str, int], pieces: list[str], prefix: str) -> None:
        self.pieces = pieces
        self.ids = {piece: id_ for id_, piece in enumerate(pieces)}
        self.prefix = prefix
        self.sequences = [[self.ids[letter] for letter in _split_word(word, prefix)] for word in words]
        self.word_counts = list(words.values())
        self.count_of_piece = _GrowableCounts()
        self.count_of_pair = _GrowableCounts()
        self.left, self.right = _GrowableCounts(), _GrowableCounts()  # piece ids of each pair
        self.pair_ids: dict[tuple[int, int], int] = {}
        self.words_with: list[set[int]] = []  # indices of the words that contain each pair
        for word in range(len(self.sequences)):
            self._count(word, 1)

    def merge_best(self, min_count: int) -> bool:
        """Merge all occurrences of the best pair; return False if no pair occurs at least ``min_count`` times."""
        together = self.count_of_pair.values
        apart = self.count_of_piece.values[self.left.values] * self.count_of_piece.values[self.right.values]
        scores = np.where(together >= min_count, together / np.maximum(apart, 1), -1.0)
        best = int(scores.argmax()) if scores.size else -1
        if best < 0 or scores[best] < 0:
            return False
        left, right = int(self.left.values[best]), int(self.right.values[best])
        merged = self.pieces[left] + self.pieces[right].removeprefix(self.prefix)
        if merged not in self.ids:  # another pair may have produced the same piece
            self.ids[merged] = len(self.pieces)
            self.pieces.append(merged)
        for word in sorted(self.words_with[best]):
            self._count(word, -1)
            self.sequences[word] = list(_merge_pair(self.sequences[word], left, right, self.ids[merged]))
            self._count(word, 1)
        return True

    def _count(self, word: int, sign: int) -> None:
        times = sign * self.word_counts[word]
        for piece in self.sequences[word]:
            self.count_of_piece.add(piece, times)
        for pair in pairwise(self.sequences[word]):
            id_ = self.pair_ids.setdefault(pair, len(self.pair_ids))
            if id_ == len(self.words_with):
                self.words_with.append(set())
                self.left.add(id_, pair[0])
                self.right.add(id_, pair[1])
            self.count_of_pair.add(id_, times)
            (self.words_with[id_].add if sign > 0 else self.words_with[id_].discard)(word)


def _merge_pair(sequence: list[int], left: int, right: int, merged: int) -> Iterator[int]:
    index = 0
    while index < len(sequence):
        found = sequence[index : index + 2] == [left, right]
        yield merged if found else sequence[index]
        index += 1 + found


class _GrowableCounts:
    """An int64 array of counts that grows on demand."""

    def __init__(self) -> None:
        self._buffer: NDArray[np.int64] = np.zeros(1024, dtype=np.int64)
        self._length = 0

    @property
    def values(self) -> NDArray[np.int64]:
        """All elements added so far, (n,)."""
        return self._buffer[: self._length]

    def add(self, index: int, number: int) -> None:
        """Add ``number`` to the element at ``index``; a missing element counts as 0."""
        if index >= len(self._buffer):
            growth = max(len(self._buffer), index + 1)
            self._buffer = np.concatenate([self._buffer, np.zeros(growth, dtype=np.int64)])
        self._length = max(self._length, index + 1)
        self._buffer[index] += number
