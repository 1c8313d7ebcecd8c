"""Count the text bytes that each token represents, even if the tokenizer does not preserve all text.

The bits per byte of a text are its tokens' negative log-likelihood in nats, divided by ln 2 and by the size of the
original text in UTF-8 bytes. If only some tokens of a document are scored, the document's bytes are distributed over
its tokens in proportion to the number of bytes to which each token decodes. If the tokenizer preserves the text, each
token is assigned exactly the bytes to which it decodes. Otherwise, for example if the tokenizer prepends a space,
lowercases the text or has unknown tokens, the byte counts are scaled and rounded so that they still sum to the size of
the document.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.text.token_shards import Int64Array, ShardedTokenStream, TokenShard

TOKENS_PER_SUM: Final = 1024
"""Interval in tokens at which cumulative byte counts are cached when a document is first read."""
TOKENS_PER_READ: Final = 2**20
"""Number of tokens to read at once; a multiple of ``TOKENS_PER_SUM``."""
REMEMBERED_DOCUMENTS: Final = 8


def share_bytes(token_bytes: Int64Array, n_tokens: Int64Array, n_bytes: int) -> Int64Array:
    """Return the number of text bytes that precede each of several positions in a document.

    Args:
        token_bytes: Number of bytes to which the tokens before each position decode, ascending array of shape (n,);
            the last position is the end of the document.
        n_tokens: Number of tokens before each position, ascending array of shape (n,); used only if all ``token_bytes``
            are 0.
        n_bytes: Size of the document in UTF-8 bytes.
    """
    weights = token_bytes if token_bytes[-1] else n_tokens
    shares: Int64Array = weights if weights[-1] == n_bytes else weights * n_bytes // max(weights[-1], 1)
    return shares


class LabelByteCounter:
    """Counter of the text bytes that the labels in a token stream span represent.

    Args:
        stream: Token stream.
        token_bytes: Number of bytes to which each token decodes, indexed by token id; 0 for end-of-text.
    """

    def __init__(self, stream: ShardedTokenStream, token_bytes: NDArray[np.int64]) -> None:
        self._stream = stream
        self._token_bytes = token_bytes
        self._sums: dict[tuple[str, str, int], Int64Array] = {}

    def count(self, start: int, length: int) -> int:
        """Return the number of text bytes that the labels in a span represent; see ``read_with_labels``."""
        start, stop = start + 1, min(start + 1 + length, self._stream.n_tokens)
        total = 0
        while start < stop:
            shard, first = self._stream.find_shard(start)
            end = min(stop, first + shard.n_tokens)
            a, b = shard.documents[:, 0].searchsorted(np.array([start, end - 1], np.uint64) - np.uint64(first), "right")
            total += int(shard.documents[a - 1 : b - 1, 1].sum())  # documents that end in the span
            total += self._before(shard, int(b) - 1, end - first) - self._before(shard, int(a) - 1, start - first)
            start = end
        return total

    def _before(self, shard: TokenShard, document: int, position: int) -> int:
        """Return the number of text bytes that a document's tokens before a shard position represent."""
        begin, n_bytes = map(int, shard.documents[document])
        last = document + 1 == len(shard.documents)
        end = shard.n_tokens if last else int(shard.documents[document + 1, 0])
        if position in (begin, end):
            return n_bytes if position == end else 0
        sums = self._cumulative_sums(shard, document, begin, end)
        chunk, rest = divmod(position - begin, TOKENS_PER_SUM)
        read = shard.tokens[position - rest : position]
        weights = np.array([sums[chunk] + self._token_bytes[read].sum(), sums[-1]])
        # The first token is the end-of-text token, which represents no text.
        return int(share_bytes(weights, np.array([position - begin - 1, end - begin - 1]), n_bytes)[0])

    def _cumulative_sums(self, shard: TokenShard, document: int, begin: int, end: int) -> Int64Array:
        """Return the cumulative token bytes before every ``TOKENS_PER_SUM``-th token of a document, and the total."""
        key = shard.folder, shard.name, document
        if key not in self._sums:
            sums = [np.zeros(1, np.int64)]
            for start in range(begin, end, TOKENS_PER_READ):
                read = self._token_bytes[shard.tokens[start : min(start + TOKENS_PER_READ, end)]]
                sums.append(np.add.reduceat(read, np.arange(0, len(read), TOKENS_PER_SUM)))
            if len(self._sums) == REMEMBERED_DOCUMENTS:
                del self._sums[next(iter(self._sums))]
            self._sums[key] = np.cumsum(np.concatenate(sums))
        return self._sums[key]
