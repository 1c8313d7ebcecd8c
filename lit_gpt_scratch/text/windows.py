"""Split long texts into windows that fit into the context of a model."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final, NamedTuple

MAX_WINDOWS: Final = 1024
"""Maximum supported number of windows per text."""


class Windows(NamedTuple):
    """Maximum size and number of the windows into which a classifier splits a text that exceeds its context.

    Attributes:
        size: Maximum number of tokens per window, including the start-of-text token.
        most: Maximum number of windows per text; the tokens after the last window are omitted.
    """

    size: int
    most: int = 1

    def split(self, ids: Sequence[int], start_of_text: int) -> list[list[int]]:
        """Split token ids into windows that begin with the start-of-text token; lengths differ by at most one token.

        Args:
            ids: Token ids of the text, without a start-of-text token.
            start_of_text: Id of the start-of-text token.
        """
        room = max(1, self.size - 1)
        kept = ids[: room * self.most]
        count = max(1, -(-len(kept) // room))
        ends = [index * len(kept) // count for index in range(count + 1)]
        return [[start_of_text, *kept[a:b]] for a, b in pairwise(ends)]

    def truncates(self, n_ids: int) -> bool:
        """Return whether ``split`` omits the end of a text of ``n_ids`` tokens."""
        return n_ids > max(1, self.size - 1) * self.most
