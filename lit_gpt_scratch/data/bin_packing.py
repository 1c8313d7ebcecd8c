"""Items into bins of one capacity."""

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


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
