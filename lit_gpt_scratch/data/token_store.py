"""Token ids on disk, mapped into memory, made once."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.sources import documents
from lit_gpt_scratch.text.split import Split, split
from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.text.training import KINDS

log = logging.getLogger(__name__)

FORMAT: Final = 1
DOCUMENTS_AT_ONCE: Final = 512
LEARN_FROM: Final = 2**28
"""Bytes of text that a tokenizer is trained on, of a longer corpus; more changes hardly a merge."""
FAST_FROM: Final = 2**25
"""Bytes of text that are worth a second of looking for a faster way to encode them."""
Side = Literal["train", "validation"]


@dataclass(frozen=True)
class Stream:
    """One side of a corpus as a single row of token ids, each document preceded by the end of text.

    Attributes:
        path: The file of little-endian ids.
        dtype: ``uint16`` or ``uint32``.
        n_tokens: Ids in the file, ends of text included.
        n_bytes: UTF-8 bytes of the documents' text.
        n_documents: Documents.
    """

    path: str
    dtype: str
    n_tokens: int
    n_bytes: int
    n_documents: int

    def open(self) -> NDArray[np.unsignedinteger[Any]]:
        """The ids as a read-only memory map, (n_tokens,).

        Raises:
            UserError: The file is missing or has another length.
        """
        expected = self.n_tokens * np.dtype(self.dtype).itemsize
        if not os.path.isfile(self.path) or os.path.getsize(self.path) != expected:
            raise UserError(
                f"{self.path} is damaged (it should have {expected} bytes); delete its folder and try again"
            )
        if self.n_tokens == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r")


@dataclass(frozen=True)
class TokenStore:
    """A prepared corpus: its tokenizer and its two streams, under the fingerprint of all that went in."""

    fingerprint: str
    tokenizer: Tokenizer
    train: Stream
    validation: Stream


@dataclass(frozen=True)
class Recipe:
    """All that decides which ids a corpus becomes.

    Args:
        source: See ``text.sources.documents``.
        vocab_size: Size of the tokenizer to train.
        tokenizer: Its kind, or the path of one to use instead.
        special: Its special tokens, beside the end of text.
        validation_share: Share of the documents to hold out.
    """

    source: str
    vocab_size: int
    tokenizer: str
    special: tuple[str, ...]
    validation_share: float

    def prepare(self, cache: Path) -> TokenStore:
        """Open the store of this recipe in ``cache``, making it first if it is not there.

        A store is written beside its place and renamed into it when it is whole, so a kill leaves either
        none or a good one; a lock, which a kill frees, keeps a second process from doing the same work.

        Raises:
            UserError: The source or the cache is unusable.
        """
        corpus = split(documents(self.source), self.validation_share)
        given = None if self.tokenizer in KINDS else Tokenizer.load(Path(self.tokenizer).expanduser())
        fingerprint = self._fingerprint(corpus, given)
        folder = cache / fingerprint[:16]
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    partial = Path(f"{folder}.partial")
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
                    self._write(partial, fingerprint, corpus, given)
                    partial.rename(folder)
        except OSError as error:
            raise UserError(
                f"cannot keep tokens in {cache} ({error.strerror}); name another folder: --data.cache"
            ) from error
        return _open(folder, fingerprint)

    def texts(self, corpus: Split, side: Side, share: float = 1.0) -> Iterator[str]:
        """The texts of one side; or about a share of them, whatever their order."""
        for place, document in enumerate(documents(self.source)):
            train, validation = corpus.parts(place, document)
            text = train if side == "train" else validation
            if text and (share == 1 or _place(text) < share):
                yield text

    def _fingerprint(self, corpus: Split, given: Tokenizer | None) -> str:
        facts = {
            "format": FORMAT,
            "corpus": corpus.fingerprint,
            "validation_share": self.validation_share,
            "tokenizer": given.to_json() if given else [self.tokenizer, self.vocab_size, *self.special],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _write(self, folder: Path, fingerprint: str, corpus: Split, given: Tokenizer | None) -> None:
        tokenizer = given
        if tokenizer is None:
            share = learned_share(corpus)
            some = "the" if share == 1 else f"{share:.1%} of the"
            log.info("training a %s tokenizer on %s training documents of %s", self.tokenizer, some, self.source)
            sample = self.texts(corpus, "train", share)
            tokenizer = Tokenizer.train(sample, self.vocab_size, self.tokenizer, self.special)
        if tokenizer.loss:
            log.warning("the tokenizer loses something: %s", tokenizer.loss)
        log.info("encoding %s", self.source)
        tokenizer.save(folder / "tokenizer.json")
        fast = corpus.n_bytes >= FAST_FROM
        sides: tuple[Side, ...] = ("train", "validation")
        streams: dict[str, dict[str, Any]] = {
            side: asdict(_encode(self.texts(corpus, side), tokenizer, folder / f"{side}.bin", fast)) for side in sides
        }
        for stream in streams.values():
            stream["path"] = Path(stream["path"]).name
        about = {"format": FORMAT, "fingerprint": fingerprint, "recipe": asdict(self), **streams}
        (folder / "store.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
        for file in folder.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())


def _encode(texts: Iterable[str], tokenizer: Tokenizer, path: Path, fast: bool) -> Stream:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    n_tokens = n_bytes = n_documents = 0
    iterator = iter(texts)
    with path.open("wb") as file:
        while chunk := list(islice(iterator, DOCUMENTS_AT_ONCE)):
            for text, ids in zip(chunk, tokenizer.encode_many(chunk, fast), strict=True):
                np.concatenate([[tokenizer.end_of_text], ids]).astype(dtype).tofile(file)
                n_tokens += 1 + len(ids)
                n_bytes += len(text.encode())
                n_documents += 1
    return Stream(str(path), dtype.str, n_tokens, n_bytes, n_documents)


def learned_share(corpus: Split) -> float:
    """The share of a corpus that a tokenizer learns from."""
    return min(1.0, LEARN_FROM / max(corpus.n_bytes, 1))


def _place(text: str) -> float:
    """Where a text stands between 0 and 1, by a hash of it: a sample that no order of the documents changes."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _open(folder: Path, fingerprint: str) -> TokenStore:
    try:
        about = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        train, validation = (_stream(folder, about[side]) for side in ("train", "validation"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no token store ({error}); delete it and try again") from error
    return TokenStore(fingerprint, Tokenizer.load(folder / "tokenizer.json"), train, validation)


def _stream(folder: Path, about: dict[str, Any]) -> Stream:
    return Stream(**{**about, "path": str(folder / about["path"])})
