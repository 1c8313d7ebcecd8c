"""A prepared corpus on disk: shards of token ids, their tokenizer, and a manifest with checksums."""

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
from lit_gpt_scratch.schema import read_json, validate
from lit_gpt_scratch.text.atomic_files import write_atomically
from lit_gpt_scratch.text.corpus import SPLITS
from lit_gpt_scratch.text.token_shards import (
    MANIFEST_FILE,
    REBUILD_HINT,
    SHARD_PARTS,
    ShardedTokenStream,
    ShardPart,
    TokenShard,
    sha256_file,
)
from lit_gpt_scratch.text.tokenizer import TOKENIZER_FILE, Tokenizer

STORE_FORMAT: Final = 3
VERIFIED_FILE: Final = "checked.json"
"""JSON file that maps each file name to its size, mtime and ctime at the time its SHA-256 was last verified."""


@dataclass(frozen=True)
class TokenStore:
    """A prepared corpus: a tokenizer, and the training and validation tokens that it produced.

    Attributes:
        folder: Folder of the store.
        fingerprint: SHA-256 of everything that determines the token ids.
        tokenizer_sha256: SHA-256 of the tokenizer file.
        vocab_size: One more than the largest possible token id.
        train: Training tokens.
        validation: Held-out tokens for validation.
        hub_datasets: Names of the Hub datasets among the sources, as recorded when the text was read.
    """

    folder: Path
    fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    train: ShardedTokenStream
    validation: ShardedTokenStream
    hub_datasets: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """Open and verify a token store created by ``TokenPreparation.prepare``.

        Files whose size and timestamps have not changed since they were last verified are not read, so opening an
        unchanged store takes the same time for any number of tokens.

        Raises:
            UserError: The folder is not a token store, or one of its files is missing or was modified.
        """
        store = cls.read_unverified(folder)
        try:
            sha256 = hashlib.sha256((folder / TOKENIZER_FILE).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{folder / TOKENIZER_FILE} is missing ({error.strerror}); {REBUILD_HINT}") from error
        if sha256 != store.tokenizer_sha256:
            raise UserError(f"the tokens in {folder} were not produced by its {TOKENIZER_FILE}; {REBUILD_HINT}")
        store.verify()
        return store

    @classmethod
    def read_unverified(cls, folder: Path) -> "TokenStore":
        """Open a store from its manifest without verifying its files."""
        manifest = cls.read_manifest(folder)
        try:
            train, validation = (
                ShardedTokenStream(
                    tuple(
                        TokenShard.from_metadata(folder, shard, f"{side}[{i}]")
                        for i, shard in enumerate(validate(manifest.get(side), list[Any], side))
                    )
                )
                for side in SPLITS
            )
            fingerprints = validate(manifest.get("fingerprints"), dict[str, str], "fingerprints")
            tokenizer = validate(fingerprints.get("tokenizer"), str, "fingerprints.tokenizer")
            fingerprint = validate(manifest.get("fingerprint"), str, "fingerprint")
            vocab_size = validate(manifest.get("vocab_size"), int, "vocab_size")
            hub_datasets = tuple(validate(manifest.get("hub_datasets", []), list[str], "hub_datasets"))
        except ValueError as error:
            raise UserError(f"{folder / MANIFEST_FILE} is corrupted ({error}); {REBUILD_HINT}") from error
        return cls(folder, fingerprint, tokenizer, vocab_size, train, validation, hub_datasets)

    @staticmethod
    def read_manifest(folder: Path) -> dict[str, Any]:
        """Read the manifest of a store.

        Raises:
            UserError: The manifest does not exist, is corrupted, or has an unsupported format version.
        """
        # Without a manifest, the folder may contain other files, so do not advise the user to delete it.
        if not (folder / MANIFEST_FILE).exists():
            raise UserError(f"{folder} is not a token store; pass a folder created by prepare --data.store")
        try:
            manifest = read_json(folder / MANIFEST_FILE, dict[str, Any])
            version, sha256 = validate(manifest.get("format"), int, "format"), manifest.pop("sha256", None)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is not a token store ({error}); {REBUILD_HINT}") from error
        if version > STORE_FORMAT:
            raise UserError(
                f"{folder} has store format {version}, which is newer than the supported format {STORE_FORMAT}; "
                "update lit_gpt_scratch"
            )
        if version < STORE_FORMAT:
            raise UserError(
                f"{folder} has store format {version}, which is older than the supported format {STORE_FORMAT}; "
                f"{REBUILD_HINT}"
            )
        if sha256 != hash_json(manifest):
            raise UserError(f"{folder / MANIFEST_FILE} does not match its checksum; {REBUILD_HINT}")
        return manifest

    @staticmethod
    def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
        """Write the manifest. Call this method only after all shards have been written."""
        manifest = {"format": STORE_FORMAT, **manifest}
        write_atomically(folder / MANIFEST_FILE, json.dumps(manifest | {"sha256": hash_json(manifest)}, indent=2))
        store = TokenStore.read_unverified(folder)
        store._save_verified(store._file_signatures())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer that produced the tokens."""
        tokenizer = Tokenizer.load(self.folder / TOKENIZER_FILE)
        if tokenizer.vocab_size != self.vocab_size:
            raise UserError(
                f"{self.folder / MANIFEST_FILE} is corrupted: vocab_size is {self.vocab_size}, but "
                f"{TOKENIZER_FILE} has {tokenizer.vocab_size} tokens; {REBUILD_HINT}"
            )
        return tokenizer

    @property
    def shards(self) -> tuple[TokenShard, ...]:
        """Shards of the training and validation splits."""
        return self.train.shards + self.validation.shards

    def verify(self, all_files: bool = False) -> None:
        """Verify the shards against the checksums in the manifest.

        Args:
            all_files: Whether to read all files, instead of only those that have changed since they were last verified.

        Raises:
            UserError: A file is missing, truncated or altered, or contains a token id outside the vocabulary.
        """
        signatures = self._file_signatures()
        verified = {} if all_files else _read_verified(self.folder)
        files = ((shard, part) for shard in self.shards for part in SHARD_PARTS)
        changed = [(shard, part) for shard, part in files if signatures[n := shard.file(part)] != verified.get(n)]
        if changed:
            _compare_hashes(changed)
            for shard in {shard.name: shard for shard, _ in changed}.values():
                shard.validate_content()
            self._save_verified(signatures)
        for shard in self.shards:
            largest = max(shard.largest, int(shard.tokens.max())) if all_files else shard.largest
            if largest >= self.vocab_size:
                raise _shard_error(
                    shard, f"contains token id {largest}, but the tokenizer has only {self.vocab_size} tokens"
                )

    def _save_verified(self, signatures: dict[str, list[int]]) -> None:
        """Record that files with these signatures have been verified."""
        with suppress(OSError):  # the folder may be read-only
            write_atomically(self.folder / VERIFIED_FILE, json.dumps(signatures))

    def _file_signatures(self) -> dict[str, list[int]]:
        return {shard.file(part): _file_signature(shard, part) for shard in self.shards for part in SHARD_PARTS}


def concatenate_stores(stores: Sequence[TokenStore]) -> TokenStore:
    """Concatenate the token streams of several stores into one store.

    Raises:
        UserError: The stores were made with different tokenizers.
    """
    first = stores[0]
    if len(stores) == 1:
        return first
    for store in stores[1:]:
        if store.tokenizer_sha256 != first.tokenizer_sha256:
            raise UserError(
                f"{store.folder} has a different tokenizer than {first.folder}; prepare both with the same tokenizer, "
                f"for example with --data.tokenizer {first.folder / TOKENIZER_FILE}"
            )
    train = ShardedTokenStream(tuple(shard for store in stores for shard in store.train.shards))
    validation = ShardedTokenStream(tuple(shard for store in stores for shard in store.validation.shards))
    fingerprint = hashlib.sha256(" ".join(store.fingerprint for store in stores).encode()).hexdigest()
    hub_datasets = tuple(name for store in stores for name in store.hub_datasets)
    return replace(first, fingerprint=fingerprint, train=train, validation=validation, hub_datasets=hub_datasets)


def hash_json(value: object) -> str:
    """Return the SHA-256 of a JSON-serializable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _file_signature(shard: TokenShard, part: ShardPart) -> list[int]:
    """Return the size, mtime and ctime of a file, from a single stat call.

    Writing to a file changes its ctime, even if its mtime is reset afterwards. On Windows, however, the ctime is the
    creation time.
    """
    name = shard.file(part)
    try:
        found = os.stat(f"{shard.folder}/{name}")  # noqa: PTH116 - building a Path costs as much as the call itself
    except OSError as error:
        raise _shard_error(shard, f"is missing ({name}: {error.strerror})") from error
    if found.st_size != shard.sizes[part]:
        raise _shard_error(shard, f"has {found.st_size:,} bytes instead of {shard.sizes[part]:,} ({name})")
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _read_verified(folder: Path) -> dict[str, list[int]]:
    try:
        return read_json(folder / VERIFIED_FILE, dict[str, list[int]])
    except (OSError, ValueError):
        return {}


def _compare_hashes(files: Sequence[tuple[TokenShard, ShardPart]]) -> None:
    """Verify the SHA-256 of each file, reading several files in parallel."""
    total = sum(shard.sizes[part] for shard, part in files)
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        tqdm(desc="verifying", total=total, unit="B", unit_scale=True, disable=None, leave=False) as progress,
    ):
        hashes = threads.map(lambda file: sha256_file(file[0].path(file[1])), files)
        try:
            for (shard, part), sha256 in zip(files, hashes, strict=True):
                if sha256 != shard.sha256[part]:
                    raise _shard_error(shard, f"is corrupted ({shard.file(part)} does not match its SHA-256)")
                progress.update(shard.sizes[part])
        except BaseException:  # including Ctrl-C: do not read the remaining files
            threads.shutdown(cancel_futures=True)
            raise


def _shard_error(shard: TokenShard, problem: str) -> UserError:
    return UserError(f"shard {shard.name} of {shard.folder} {problem}; {REBUILD_HINT}")
