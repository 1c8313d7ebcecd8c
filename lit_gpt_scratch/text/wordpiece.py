"""Train WordPiece as originally described: each merge maximizes the likelihood, not the pair frequency."""

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

Int64Array = NDArray[np.int64]

MAX_PIECES: Final = 2**31
"""Upper bound on the number of pieces, so that a pair of piece ids fits into one int64 key."""


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
    counts = _PairCounts(words, alphabet, prefix)
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


class _PairCounts:
    """Words as sequences of pieces, with up-to-date counts of pieces and adjacent pairs.

    The sequences of all words are stored in one array. With each merge, the sequence of a word becomes shorter, but its
    start position stays the same. Pairs are identified by the key ``left * MAX_PIECES + right``.
    """

    def __init__(self, words: Mapping[str, int], alphabet: Iterable[str], prefix: str) -> None:
        self.prefix = prefix
        self.ids = {piece: id_ for id_, piece in enumerate(_initial_pieces(words, alphabet, prefix))}
        self.pieces = list(self.ids)
        self.word_counts = np.fromiter(words.values(), np.int64, len(words))
        self.lengths = np.fromiter(map(len, words), np.int64, len(words))
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.sequences = _encode_letters(words, self.ids, self.starts, prefix)
        self.count_of_piece, self.count_of_pair = _GrowableCounts(), _GrowableCounts()
        self.left, self.right = _GrowableCounts(), _GrowableCounts()  # piece ids of each pair
        self.pair_ids: dict[int, int] = {}
        self.words_with: list[list[Int64Array]] = []  # words that contain each pair, or did before a later merge
        word = np.repeat(np.arange(len(words)), self.lengths)
        self.count_of_piece.add(self.sequences, self.word_counts[word])
        self._count_pairs(self.sequences, word, np.ones(len(word), bool), 1)

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
        self._merge(np.unique(np.concatenate(self.words_with[best])), left, right, self.ids[merged])
        self.words_with[best] = [np.zeros(0, np.int64)]
        return True

    def _merge(self, words: Int64Array, left: int, right: int, merged: int) -> None:
        """Merge all occurrences of a pair in the given words, and update the counts."""
        word = np.repeat(words, self.lengths[words])
        places = _ranges(self.starts[words], self.lengths[words])
        pieces = self.sequences[places]
        found = np.flatnonzero((pieces[:-1] == left) & (pieces[1:] == right) & (word[:-1] == word[1:]))
        found = _without_overlaps(found)
        first, second = np.zeros(len(pieces), bool), np.zeros(len(pieces), bool)
        first[found], second[found + 1] = True, True
        times = self.word_counts[word[found]]
        for piece, sign in ((left, -1), (right, -1), (merged, 1)):
            self.count_of_piece.add(np.full(len(found), piece), sign * times)
        self._count_pairs(pieces, word, first | second, -1)
        pieces[first] = merged
        pieces, word, first = pieces[~second], word[~second], first[~second]
        self._count_pairs(pieces, word, first, 1)
        self.lengths[words] -= np.bincount(np.searchsorted(words, word[first]), minlength=len(words))
        self.sequences[_ranges(self.starts[words], self.lengths[words])] = pieces

    def _count_pairs(self, pieces: Int64Array, word: Int64Array, changed: NDArray[np.bool_], sign: int) -> None:
        """Add or subtract the pairs that contain a changed piece; all arrays have shape (n,)."""
        at = np.flatnonzero((changed[:-1] | changed[1:]) & (word[:-1] == word[1:]))
        keys, first, pair = np.unique(pieces[at] * MAX_PIECES + pieces[at + 1], return_index=True, return_inverse=True)
        by_pair = np.split(word[at][np.argsort(pair, kind="stable")], np.cumsum(np.bincount(pair))[:-1])
        ids = np.zeros(len(keys), np.int64)
        for index in np.argsort(first).tolist():  # new pairs are numbered by their first occurrence
            key = int(keys[index])
            ids[index] = id_ = self.pair_ids.setdefault(key, len(self.pair_ids))
            if id_ == len(self.words_with):
                self.words_with.append([])
                self.left.add(np.array([id_]), np.array([key // MAX_PIECES]))
                self.right.add(np.array([id_]), np.array([key % MAX_PIECES]))
            if sign > 0:
                self.words_with[id_].append(by_pair[index])
        self.count_of_pair.add(ids[pair], sign * self.word_counts[word[at]])


def _initial_pieces(words: Iterable[str], alphabet: Iterable[str], prefix: str) -> dict[str, None]:
    """Return the single-character pieces: both forms of each alphabet character, and those that occur in the words."""
    pieces = {piece: None for symbol in alphabet for piece in (symbol, prefix + symbol)}
    for word in words:
        pieces.setdefault(word[0])
        pieces |= {prefix + letter: None for letter in word[1:]}
    return pieces


def _encode_letters(words: Iterable[str], ids: Mapping[str, int], starts: Int64Array, prefix: str) -> Int64Array:
    """Return the single-character piece ids of all words, concatenated into an array of shape (n,)."""
    letters = "".join(words)
    codes, letter = np.unique(np.frombuffer(letters.encode("utf-32-le"), "<u4"), return_inverse=True)
    forms = [[ids.get(form + chr(code), -1) for code in codes.tolist()] for form in (prefix, "")]
    continues, begins = np.array(forms, np.int64)
    sequences: Int64Array = continues[letter]
    sequences[starts] = begins[letter[starts]]
    return sequences


def _ranges(starts: Int64Array, lengths: Int64Array) -> Int64Array:
    """Return the concatenation of the ranges ``start, ..., start + length - 1``."""
    before = np.cumsum(lengths) - lengths
    ranges: Int64Array = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
    return ranges


def _without_overlaps(found: Int64Array) -> Int64Array:
    """Keep every second position in each run of consecutive positions, starting with the first.

    The pairs at consecutive positions overlap: in ``a a a``, only the first pair ``a a`` can be merged.
    """
    begins = np.diff(found, prepend=-2) != 1
    run_start = found[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    kept: Int64Array = found[(found - run_start) % 2 == 0]
    return kept


class _GrowableCounts:
    """An int64 array of counts that grows on demand."""

    def __init__(self) -> None:
        self._buffer: Int64Array = np.zeros(1024, dtype=np.int64)
        self._length = 0

    @property
    def values(self) -> Int64Array:
        """Array of all elements added so far."""
        return self._buffer[: self._length]

    def add(self, indices: Int64Array, numbers: Int64Array) -> None:
        """Add each of n numbers to the element at its index; missing elements count as 0."""
        if not len(indices):
            return
        self._length = max(self._length, int(indices.max()) + 1)
        if self._length > len(self._buffer):
            self._buffer = np.concatenate([self._buffer, np.zeros(self._length, dtype=np.int64)])
        np.add.at(self._buffer, indices, numbers)
