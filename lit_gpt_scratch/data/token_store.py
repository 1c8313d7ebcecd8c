"""A prepared corpus on disk: shards of token ids, their tokenizer, and what tells that they are as they were made."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.atomic_files import atomic_file
from lit_gpt_scratch.text.corpus import SPLITS
from lit_gpt_scratch.text.token_shards import SHARD_PARTS, ShardedTokenStream, ShardPart, TokenShard, sha256_file
from lit_gpt_scratch.text.tokenizer import TOKENIZER_FILE, Tokenizer

STORE_FORMAT: Final = 3
MANIFEST_FILE: Final = "store.json"
VERIFIED_FILE: Final = "checked.json"
"""By file name, what the system said of it when its content was last compared with its SHA-256."""
REBUILD_HINT: Final = "delete the folder and prepare it again"


@dataclass(frozen=True)
class TokenStore:
    """A tokenizer and two streams of its tokens.

    Attributes:
        folder: Where it lies.
        fingerprint: Of all that decides the ids.
        tokenizer_sha256: Of its file.
        vocab_size: One more than the largest id there can be.
        train: Tokens to learn from.
        validation: Tokens held out.
    """

    folder: Path
    fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    train: ShardedTokenStream
    validation: ShardedTokenStream

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Open a folder that ``Recipe.prepare`` made.

        That takes no longer for more tokens: of each file it looks at size and dates, and reads only those that do not
        look as they did when they were last checked.

        Raises:
            UserError: It is no such folder, or a file in it is not as it was made.
        """
        store = cls.read_unverified(folder)
        try:
            here = hashlib.sha256((folder / TOKENIZER_FILE).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{folder / TOKENIZER_FILE} is missing ({error.strerror}); {REBUILD_HINT}") from error
        if here != store.tokenizer_sha256:
            raise UserError(f"{folder} was made with another tokenizer than its {TOKENIZER_FILE}; {REBUILD_HINT}")
        store.verify()
        return store

    @classmethod
    def read_unverified(cls, folder: Path) -> "TokenStore":
        """A store as its folder tells of it, without looking whether that is so."""
        about = cls.read_manifest(folder)
        try:
            sides = [
                ShardedTokenStream(tuple(TokenShard(folder=str(folder), **shard) for shard in about[side]))
                for side in SPLITS
            ]
            tokenizer = about["fingerprints"]["tokenizer"]
            return cls(folder, about["fingerprint"], tokenizer, about["vocab_size"], *sides)
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / MANIFEST_FILE} is damaged ({error}); {REBUILD_HINT}") from error

    @staticmethod
    def read_manifest(folder: Path) -> dict[str, Any]:
        """What a folder says of its tokens.

        Raises:
            UserError: It says nothing, or says it in another format.
        """
        if not (folder / MANIFEST_FILE).exists():  # it may be something else, which nobody should be told to delete
            raise UserError(f"there is no token store {folder}; name a folder that prepare --data.store has made")
        try:
            found: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            made_in, sealed = int(found["format"]), found.pop("sha256", None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder} is no token store ({error}); {REBUILD_HINT}") from error
        if made_in > STORE_FORMAT:
            raise UserError(
                f"{folder} is a store of format {made_in}, newer than {STORE_FORMAT}; update lit_gpt_scratch"
            )
        if made_in < STORE_FORMAT:
            raise UserError(f"{folder} is a store of format {made_in}, older than {STORE_FORMAT}; {REBUILD_HINT}")
        if sealed != hash_json(found):
            raise UserError(f"{folder / MANIFEST_FILE} is not what was written; {REBUILD_HINT}")
        return found

    @staticmethod
    def write_manifest(folder: Path, about: dict[str, Any]) -> None:
        """Write what ``manifest`` reads, when all shards are there."""
        about = {"format": STORE_FORMAT, **about}
        with atomic_file(folder / MANIFEST_FILE) as file:
            file.write(json.dumps(about | {"sha256": hash_json(about)}, indent=2).encode())
        store = TokenStore.read_unverified(folder)
        store._save_verified(store._signatures())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens."""
        return Tokenizer.load(self.folder / TOKENIZER_FILE)

    @property
    def shards(self) -> tuple[TokenShard, ...]:
        """Of both sides."""
        return self.train.shards + self.validation.shards

    def verify(self, all_files: bool = False) -> None:
        """Compare shards with what was made.

        Args:
            all_files: Read all files, and not only those that look altered since they were last checked.

        Raises:
            UserError: One is missing, truncated or altered, or has an id that the tokenizer has not.
        """
        now = self._signatures()
        before = {} if all_files else _read_verified(self.folder)
        files = ((shard, part) for shard in self.shards for part in SHARD_PARTS)
        doubtful = [(shard, part) for shard, part in files if now[name := shard.file(part)] != before.get(name)]
        if doubtful:
            _compare_hashes(doubtful)
            self._save_verified(now)
        for shard in self.shards:
            largest = max(shard.largest, int(shard.tokens.max())) if all_files else shard.largest
            if largest >= self.vocab_size:
                raise _shard_error(shard, f"has token {largest}, but its tokenizer only {self.vocab_size} tokens")

    def _save_verified(self, signatures: dict[str, list[int]]) -> None:
        """Remember that all files are as they were made, with these signatures."""
        with suppress(OSError), atomic_file(self.folder / VERIFIED_FILE) as file:  # a folder may be for reading only
            file.write(json.dumps(signatures).encode())

    def _signatures(self) -> dict[str, list[int]]:
        return {shard.file(part): _file_signature(shard, part) for shard in self.shards for part in SHARD_PARTS}


def concatenate_stores(stores: Sequence[TokenStore]) -> TokenStore:
    """Several stores as one, their streams one behind the other.

    Raises:
        UserError: They were not made with one tokenizer.
    """
    first = stores[0]
    if len(stores) == 1:
        return first
    for store in stores[1:]:
        if store.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(
                f"{store.folder} was made with another tokenizer than {first.folder}; make both with one: "
                f"--data.tokenizer {first.folder / TOKENIZER_FILE}"
            )
    train = ShardedTokenStream(tuple(shard for store in stores for shard in store.train.shards))
    validation = ShardedTokenStream(tuple(shard for store in stores for shard in store.validation.shards))
    fingerprint = hashlib.sha256(" ".join(store.fingerprint for store in stores).encode()).hexdigest()
    return replace(first, fingerprint=fingerprint, train=train, validation=validation)


def hash_json(facts: object) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _file_signature(shard: TokenShard, part: ShardPart) -> list[int]:
    """Size, and times of the last writing and change: what the system says of a file for next to nothing.

    Writing to it changes the last, even where the other is set back; but on Windows, where it is that of the creation.
    """
    name = shard.file(part)
    try:
        found = os.stat(f"{shard.folder}/{name}")  # noqa: PTH116 - of thousands of files, where a Path costs as much
    except OSError as error:
        raise _shard_error(shard, f"is not there ({name}: {error.strerror})") from error
    if found.st_size != shard.sizes[part]:
        raise _shard_error(shard, f"has {found.st_size:,} bytes instead of {shard.sizes[part]:,} ({name})")
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _read_verified(folder: Path) -> dict[str, list[int]]:
    try:
        found: dict[str, list[int]] = json.loads((folder / VERIFIED_FILE).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def _compare_hashes(files: Sequence[tuple[TokenShard, ShardPart]]) -> None:
    """Read files, several at once, and compare them with their SHA-256."""
    total = sum(shard.sizes[part] for shard, part in files)
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        tqdm(desc="checking", total=total, unit="B", unit_scale=True, disable=None, leave=False) as progress,
    ):
        found = threads.map(lambda file: sha256_file(file[0].path(file[1])), files)
        try:
            for (shard, part), sha256 in zip(files, found, strict=True):
                if sha256 != shard.sha256[part]:
                    raise _shard_error(shard, f"is not what was written ({shard.file(part)}: its SHA-256 differs)")
                progress.update(shard.sizes[part])
        except BaseException:  # Ctrl-C, too: the others need not be read any more
            threads.shutdown(cancel_futures=True)
            raise


def _shard_error(shard: TokenShard, why: str) -> UserError:
    return UserError(f"shard {shard.name} of {shard.folder} {why}; {REBUILD_HINT}")
