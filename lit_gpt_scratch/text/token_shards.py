"""Token ids in files, and files as a single row of token ids.

A shard is two files that ``numpy.load`` reads: ``train-00000.tokens.npy``, (n_tokens,) uint16 or uint32, each document
preceded by the end of text; and ``train-00000.documents.npy``, (n_documents, 2) uint64, the token at which each
document begins and its bytes of text.
"""

import hashlib
import mmap
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.text.atomic_files import atomic_file

TokenIds = NDArray[np.unsignedinteger[Any]]
Int64Array = NDArray[np.int64]
ShardPart = Literal["tokens", "documents"]
SHARD_PARTS: Final[tuple[ShardPart, ...]] = ("tokens", "documents")


class PicklableMemmaps:
    """What maps files into memory when they are first read; sent to another process, it does so anew there."""

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would be the whole file.
        return {name: value for name, value in self.__dict__.items() if not isinstance(value, np.ndarray)}


@dataclass(frozen=True)
class TokenShard(PicklableMemmaps):
    """A part of a stream.

    Attributes:
        folder: Where its files are.
        name: What their names begin with.
        n_tokens: Ids, ends of text included.
        n_bytes: UTF-8 bytes of the documents' text.
        n_documents: Documents.
        largest: The largest id.
        sizes: Bytes of each file.
        sha256: Of each file.
    """

    folder: str
    name: str
    n_tokens: int
    n_bytes: int
    n_documents: int
    largest: int
    sizes: dict[ShardPart, int]
    sha256: dict[ShardPart, str]

    @classmethod
    def write(cls, folder: Path, name: str, tokens: TokenIds, documents: NDArray[np.uint64]) -> "TokenShard":
        """Write its files; a kill leaves each whole or not there."""
        n_bytes, largest = int(documents[:, 1].sum()), int(tokens.max())
        made = cls(str(folder), name, len(tokens), n_bytes, len(documents), largest, {}, {})
        for part, array in zip(SHARD_PARTS, (tokens, documents), strict=True):
            path = made.path(part)
            with atomic_file(path) as file:
                np.save(file, array)
            made.sizes[part], made.sha256[part] = path.stat().st_size, sha256_file(path)
        return made

    def file(self, part: ShardPart) -> str:
        """The name of one of its files."""
        return f"{self.name}.{part}.npy"

    def path(self, part: ShardPart) -> Path:
        """Where it is."""
        return Path(self.folder, self.file(part))

    @property
    def about(self) -> dict[str, Any]:
        """All but the folder, as plain data."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    @cached_property
    def tokens(self) -> TokenIds:
        """(n_tokens,), read-only."""
        return np.asarray(np.load(self.path("tokens"), mmap_mode="r"))

    @cached_property
    def documents(self) -> NDArray[np.uint64]:
        """(n_documents, 2), read-only: the token at which each begins, and its bytes of text."""
        return np.asarray(np.load(self.path("documents"), mmap_mode="r"))


@dataclass(frozen=True)
class ShardedTokenStream:
    """Shards, one behind the other."""

    shards: tuple[TokenShard, ...]

    @cached_property
    def ends(self) -> list[int]:
        """For each shard, the first token that is behind it."""
        return list(accumulate(shard.n_tokens for shard in self.shards))

    @property
    def n_tokens(self) -> int:
        """Ids, ends of text included."""
        return self.ends[-1] if self.shards else 0

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the documents' text."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def n_documents(self) -> int:
        """Documents."""
        return sum(shard.n_documents for shard in self.shards)

    def shard_of(self, token: int) -> tuple[TokenShard, int]:
        """The shard that holds a token, and its first token."""
        place = bisect_right(self.ends, token)
        return self.shards[place], self.ends[place] - self.shards[place].n_tokens

    def describe_position(self, token: int) -> str:
        """The shard that holds a token, for a message."""
        shard, _ = self.shard_of(token)
        return f"shard {shard.name} of {shard.folder}"

    def document_spans(self) -> Iterator[tuple[Int64Array, Int64Array]]:
        """Of each shard, the first token of its documents, counted through the stream, and how many each has."""
        for shard, end in zip(self.shards, self.ends, strict=True):
            starts = shard.documents[:, 0].astype(np.int64)
            yield starts + end - shard.n_tokens, np.diff(starts, append=shard.n_tokens)

    def document_starts(self, start: int, stop: int) -> Int64Array:
        """Which tokens from ``start`` to ``stop`` are the first of a document."""
        found: list[Int64Array] = []
        stop = min(stop, self.n_tokens)
        while start < stop:
            shard, first = self.shard_of(start)
            end = min(stop, first + shard.n_tokens)
            begins = shard.documents[:, 0]
            between = np.array([start - first, end - first], begins.dtype)  # of another type, all would be converted
            a, b = begins.searchsorted(between)
            found.append(begins[a:b].astype(np.int64) + first)
            start = end
        return found[0] if len(found) == 1 else np.concatenate(found or [np.zeros(0, np.int64)])

    def read_with_labels(self, start: int, length: int) -> tuple[TokenIds, TokenIds]:
        """So many tokens, and what follows each; the stream's last has nothing that does."""
        tokens = self.read(start, start + length + 1)
        return tokens[:length], tokens[1:]

    def read(self, start: int, stop: int) -> TokenIds:
        """Tokens ``start`` to ``stop``, or to the end; within a shard nothing is copied."""
        stop = min(stop, self.n_tokens)
        found: list[TokenIds] = []
        while start < stop:
            shard, first = self.shard_of(start)
            found.append(shard.tokens[start - first : stop - first])
            start += len(found[-1])
        return found[0] if len(found) == 1 else np.concatenate(found or [np.zeros(0, np.uint16)])


def sha256_file(path: Path) -> str:
    """SHA-256 of a file that is not empty."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()
