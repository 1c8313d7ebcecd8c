"""WordPiece as it was first described: join the pair that makes the text most likely, not the most frequent one."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm


def learn_wordpieces(
    words: Mapping[str, int], alphabet: Iterable[str], size: int, min_count: int | None = None, prefix: str = "##"
) -> list[str]:
    """A vocabulary of pieces, in the order in which they were learned.

    Each step joins the two neighbouring pieces ``a`` and ``b`` with the greatest ``count(ab) / (count(a) count(b))``:
    a language model of single pieces gains most likelihood by it (Schuster and Nakajima 2012, Japanese and Korean
    Voice Search; the score as in Hugging Face's course). Of equals the one that stands first in the words is taken.

    Args:
        words: How often each word occurs.
        alphabet: Characters that are to be known whether they occur or not, as begin and as continuation.
        size: Pieces in the vocabulary, at most.
        min_count: Pairs that are rarer are left apart. The score alone loves what is rare: it would join whatever
            occurs once first, and fill the vocabulary with it. By default the bound begins at the most frequent
            pair and is halved, down to 2, each time that no pair is left above it.
        prefix: Marks a piece that goes on with a word. No word should hold it: it would look like a mark.
    """
    pieces = {piece: None for symbol in alphabet for piece in (symbol, prefix + symbol)}
    pieces |= {piece: None for word in words for piece in _letters(word, prefix)}
    corpus = _Corpus(words, list(pieces), prefix)
    bound = min_count or corpus.count_of_pair.values.max(initial=2)
    known = len(corpus.pieces)
    with tqdm(total=size, initial=known, desc="pieces", unit="", delay=2, leave=False, disable=None) as bar:
        while len(corpus.pieces) < size:
            if corpus.join_best(bound):
                bar.update()
            elif min_count or bound <= 2:
                break
            else:
                bound = max(2, bound // 2)
    return corpus.pieces


def _letters(word: str, prefix: str) -> Iterator[str]:
    yield word[0]
    yield from (prefix + letter for letter in word[1:])


class _Corpus:
    """Words as rows of pieces, with the counts of pieces and pairs kept up to date."""

    def __init__(self, words: Mapping[str, int], pieces: list[str], prefix: str) -> None:
        self.pieces = pieces
        self.ids = {piece: place for place, piece in enumerate(pieces)}
        self.prefix = prefix
        self.rows = [[self.ids[letter] for letter in _letters(word, prefix)] for word in words]
        self.times = list(words.values())
        self.count_of_piece = _Numbers()
        self.count_of_pair = _Numbers()
        self.left, self.right = _Numbers(), _Numbers()  # of each pair
        self.pairs: dict[tuple[int, int], int] = {}
        self.rows_with: list[set[int]] = []
        for row in range(len(self.rows)):
            self._count(row, 1)

    def join_best(self, min_count: int) -> bool:
        """Join the best pair everywhere; False if there is none that is frequent enough."""
        together = self.count_of_pair.values
        apart = self.count_of_piece.values[self.left.values] * self.count_of_piece.values[self.right.values]
        scores = np.where(together >= min_count, together / np.maximum(apart, 1), -1.0)
        best = int(scores.argmax()) if scores.size else -1
        if best < 0 or scores[best] < 0:
            return False
        left, right = int(self.left.values[best]), int(self.right.values[best])
        joined = self.pieces[left] + self.pieces[right].removeprefix(self.prefix)
        if joined not in self.ids:  # another pair can have made the same piece
            self.ids[joined] = len(self.pieces)
            self.pieces.append(joined)
        for row in sorted(self.rows_with[best]):
            self._count(row, -1)
            self.rows[row] = list(_joined(self.rows[row], left, right, self.ids[joined]))
            self._count(row, 1)
        return True

    def _count(self, row: int, sign: int) -> None:
        times = sign * self.times[row]
        for piece in self.rows[row]:
            self.count_of_piece.add(piece, times)
        for pair in pairwise(self.rows[row]):
            place = self.pairs.setdefault(pair, len(self.pairs))
            if place == len(self.rows_with):
                self.rows_with.append(set())
                self.left.add(place, pair[0])
                self.right.add(place, pair[1])
            self.count_of_pair.add(place, times)
            (self.rows_with[place].add if sign > 0 else self.rows_with[place].discard)(row)


def _joined(row: list[int], left: int, right: int, joined: int) -> Iterator[int]:
    place = 0
    while place < len(row):
        here = row[place : place + 2] == [left, right]
        yield joined if here else row[place]
        place += 1 + here


class _Numbers:
    """Whole numbers by place, of which there come ever more."""

    def __init__(self) -> None:
        self._all: NDArray[np.int64] = np.zeros(1024, dtype=np.int64)
        self._length = 0

    @property
    def values(self) -> NDArray[np.int64]:
        """All so far."""
        return self._all[: self._length]

    def add(self, place: int, number: int) -> None:
        """Add to what stands at a place, or to zero."""
        if place >= len(self._all):
            self._all = np.concatenate([self._all, np.zeros(max(len(self._all), place + 1), dtype=np.int64)])
        self._length = max(self._length, place + 1)
        self._all[place] += number
