"""Store token ids in shards on disk, and read token streams that span several shards.

A shard consists of two files that ``numpy.load`` can read. ``train-00000.tokens.npy``, (n_tokens,) uint16 or uint32,
contains token ids, with an end-of-text token before each document. ``train-00000.documents.npy``, (n_documents, 2)
uint64, contains the position of this end-of-text token and the number of bytes of text for each document.
"""

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import validate
from lit_gpt_scratch.text.atomic_files import atomic_file

TokenIds = NDArray[np.unsignedinteger[Any]]
Int64Array = NDArray[np.int64]
ShardPart = Literal["tokens", "documents"]
SHARD_PARTS: Final[tuple[ShardPart, ...]] = ("tokens", "documents")
READ_BYTES: Final = 1 << 20


def require_file_size(path: str, size: int) -> None:
    """Check the size of a memory-mapped file; reading beyond the end of a truncated file would kill the process.

    A file that was deleted can still be read. The check takes a microsecond.

    Raises:
        UserError: The file was truncated or replaced.
    """
    with suppress(FileNotFoundError):
        found = os.stat(path).st_size  # noqa: PTH116 - building a Path costs as much as the call itself
        if found != size:
            raise UserError(
                f"{path} has {found:,} bytes instead of {size:,}: it was changed while it was in use; prepare the "
                "text again, and resume the run"
            )


MANIFEST_FILE: Final = "store.json"
REBUILD_HINT: Final = "delete the folder and prepare the corpus again"


class PicklableMemmaps:
    """Mixin that excludes cached memory-mapped arrays from pickling; an unpickled copy maps the files again."""

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would contain the whole file.
        return {name: value for name, value in self.__dict__.items() if not isinstance(value, np.ndarray)}


@dataclass(frozen=True)
class TokenShard(PicklableMemmaps):
    """Shard of a token stream, stored in two files.

    Attributes:
        folder: Folder that contains the files.
        name: Prefix of the file names.
        n_tokens: Number of tokens, including end-of-text tokens.
        n_bytes: Total text size of the documents in UTF-8 bytes.
        n_documents: Number of documents.
        largest: Largest token id.
        sizes: Size of each file in bytes.
        sha256: SHA-256 digest of each file.
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
    def from_metadata(cls, folder: Path, metadata: Any, name: str) -> "TokenShard":
        """Build a shard from its ``metadata`` in a JSON file.

        Args:
            folder: Folder that contains the files.
            metadata: Parsed JSON value of the shard's ``metadata``.
            name: Name of the metadata in the JSON file, used in error messages.

        Raises:
            ValueError: The metadata is invalid.
        """
        values = validate(metadata, dict[str, Any], name)
        shard = validate({"folder": str(folder), **values}, cls, name)
        if not re.fullmatch(r"[\w-]+", shard.name):
            raise ValueError(f"{name}.name must contain only letters, digits, '_' and '-'")
        if min(shard.n_tokens, shard.n_bytes, shard.n_documents, shard.largest) < 0:
            raise ValueError(f"{name} contains a negative number")
        if not shard.sizes.keys() == shard.sha256.keys() == set(SHARD_PARTS):
            raise ValueError(f"{name} does not describe the files {' and '.join(SHARD_PARTS)}")
        return shard

    @classmethod
    def write(cls, folder: Path, name: str, tokens: TokenIds, documents: NDArray[np.uint64]) -> "TokenShard":
        """Write the two files of a shard, each atomically, and return the shard."""
        n_bytes, largest = int(documents[:, 1].sum()), int(tokens.max())
        shard = cls(str(folder), name, len(tokens), n_bytes, len(documents), largest, {}, {})
        for part, array in zip(SHARD_PARTS, (tokens, documents), strict=True):
            path = shard.path(part)
            with atomic_file(path) as file:
                # np.save() is not used: if the disk is full, its tofile() raises no error, or one without an errno.
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                file.write(np.ascontiguousarray(array).data)
            shard.sizes[part], shard.sha256[part] = path.stat().st_size, sha256_file(path)
        return shard

    def file(self, part: ShardPart) -> str:
        """Return the name of the file that contains ``part``."""
        return f"{self.name}.{part}.npy"

    def path(self, part: ShardPart) -> Path:
        """Return the path of the file that contains ``part``."""
        return Path(self.folder, self.file(part))

    @property
    def metadata(self) -> dict[str, Any]:
        """All attributes except the folder, as a JSON-serializable dictionary."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    @property
    def tokens(self) -> TokenIds:
        """Token ids, read-only memory-mapped array of shape (n_tokens,)."""
        require_file_size(f"{self.folder}/{self.name}.tokens.npy", self.sizes["tokens"])
        return self._tokens

    @property
    def documents(self) -> NDArray[np.uint64]:
        """Start position and text bytes of each document, read-only memory-mapped array of shape (n_documents, 2)."""
        require_file_size(f"{self.folder}/{self.name}.documents.npy", self.sizes["documents"])
        return self._documents

    @cached_property
    def _tokens(self) -> TokenIds:
        found: TokenIds = self._map("tokens", (self.n_tokens,), (np.uint16, np.uint32))
        return found

    @cached_property
    def _documents(self) -> NDArray[np.uint64]:
        found: NDArray[np.uint64] = self._map("documents", (self.n_documents, 2), (np.uint64,))
        return found

    def _map(self, part: ShardPart, shape: tuple[int, ...], dtypes: tuple[type[np.unsignedinteger[Any]], ...]) -> Any:
        """Memory-map a file.

        Raises:
            UserError: The file is not an array with this shape and one of these dtypes.
        """
        try:
            found = np.asarray(np.lib.format.open_memmap(self.path(part), mode="r"))
        except Exception as error:  # numpy parses the header as a Python literal, which can raise anything
            problem = f"is not a NumPy array ({' '.join(str(error).split())[:100]})"
        else:
            if found.shape == shape and found.dtype in dtypes and found.flags.c_contiguous:
                return found
            problem = (
                f"contains a {found.dtype} array of shape {found.shape}, but {MANIFEST_FILE} requires an unsigned "
                f"integer array of shape {shape}"
            )
        raise UserError(f"{self.path(part)} {problem}; {REBUILD_HINT}")

    def validate_content(self) -> None:
        """Check that both files match the attributes; reads the files completely.

        Raises:
            UserError: The document positions, the number of bytes or the largest token id is wrong.
        """
        starts, sizes = self.documents[:, 0], self.documents[:, 1]
        # Compare starts directly and sum Python integers: differences and sums of unsigned integers wrap around.
        ordered = bool((starts[1:] > starts[:-1]).all()) and (not len(starts) or int(starts[-1]) < self.n_tokens)
        if not ordered or (len(starts) and starts[0] != 0) or sum(sizes.tolist()) != self.n_bytes:
            raise UserError(f"{self.path('documents')} does not describe the tokens of its shard; {REBUILD_HINT}")
        if self.n_tokens and int(self.tokens.max()) != self.largest:
            raise UserError(f"the token ids in {self.path('tokens')} do not match {MANIFEST_FILE}; {REBUILD_HINT}")


@dataclass(frozen=True)
class ShardedTokenStream:
    """Token stream that concatenates several shards."""

    shards: tuple[TokenShard, ...]

    @cached_property
    def ends(self) -> list[int]:
        """Stream position after the last token of each shard."""
        return list(accumulate(shard.n_tokens for shard in self.shards))

    @property
    def n_tokens(self) -> int:
        """Number of tokens, including end-of-text tokens."""
        return self.ends[-1] if self.shards else 0

    @property
    def n_bytes(self) -> int:
        """Total text size of the documents in UTF-8 bytes."""
        return sum(shard.n_bytes for shard in self.shards)

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return sum(shard.n_documents for shard in self.shards)

    def find_shard(self, position: int) -> tuple[TokenShard, int]:
        """Return the shard that contains a stream position, and the stream position of the shard's first token."""
        index = bisect_right(self.ends, position)
        return self.shards[index], self.ends[index] - self.shards[index].n_tokens

    def describe_position(self, token: int) -> str:
        """Return the name and folder of the shard that contains a stream position, for error messages."""
        shard, _ = self.find_shard(token)
        return f"shard {shard.name} of {shard.folder}"

    def document_spans(self) -> Iterator[tuple[Int64Array, Int64Array]]:
        """Yield, for each shard, the start positions of its documents in the stream and their lengths in tokens."""
        for shard, end in zip(self.shards, self.ends, strict=True):
            starts = shard.documents[:, 0].astype(np.int64)
            yield starts + end - shard.n_tokens, np.diff(starts, append=shard.n_tokens)

    def document_starts(self, start: int, stop: int) -> Int64Array:
        """Return the stream positions in ``[start, stop)`` at which a document starts."""
        found: list[Int64Array] = []
        stop = min(stop, self.n_tokens)
        while start < stop:
            shard, first = self.find_shard(start)
            end = min(stop, first + shard.n_tokens)
            starts = shard.documents[:, 0]
            bounds = np.array([start - first, end - first], starts.dtype)  # same dtype, so that starts is not converted
            a, b = starts.searchsorted(bounds)
            found.append(starts[a:b].astype(np.int64) + first)
            start = end
        return found[0] if len(found) == 1 else np.concatenate(found or [np.zeros(0, np.int64)])

    def read_with_labels(self, start: int, length: int) -> tuple[TokenIds, TokenIds]:
        """Return ``length`` tokens and their labels (the next tokens); the last token of the stream has no label."""
        tokens = self.read(start, start + length + 1)
        return tokens[:length], tokens[1:]

    def count_labels(self, starts: Int64Array, lengths: Int64Array) -> Int64Array:
        """Count the labels in each of n spans; every token except the last of the stream has a label."""
        counts: Int64Array = np.minimum(lengths, self.n_tokens - 1 - starts)
        return counts

    def read(self, start: int, stop: int) -> TokenIds:
        """Return the tokens in ``[start, stop)``, or up to the end of the stream if it is shorter.

        Tokens are copied only if they span several shards.
        """
        stop = min(stop, self.n_tokens)
        found: list[TokenIds] = []
        while start < stop:
            shard, first = self.find_shard(start)
            found.append(shard.tokens[start - first : stop - first])
            start += len(found[-1])
        return found[0] if len(found) == 1 else np.concatenate(found or [np.zeros(0, np.uint16)])


def sha256_file(path: Path) -> str:
    """Return the SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
