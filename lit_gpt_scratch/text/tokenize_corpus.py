"""Documents into shards of token ids, in several processes, each shard whole or not there."""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from lit_gpt_scratch.text.atomic_files import whole_file
from lit_gpt_scratch.text.corpus import SIDES, Corpus, Side
from lit_gpt_scratch.text.parquet_io import groups, shelved
from lit_gpt_scratch.text.process_pool import spawned
from lit_gpt_scratch.text.token_shards import PARTS, Shard, digest
from lit_gpt_scratch.text.tokenizer import FILE as TOKENIZER
from lit_gpt_scratch.text.tokenizer import Tokenizer

SHARD: Final = 2**26
"""Bytes of text in a shard, about; more if there would be more than ``MOST`` of them."""
MOST: Final = 1024
ENCODED_AT_ONCE: Final = 2**22
"""Characters of text."""
FAST_FROM: Final = 2**25
"""Bytes of text that are worth a second of looking for a faster way to encode them."""


@dataclass(frozen=True)
class Job:
    """A shard to make.

    Attributes:
        texts: A Parquet file of documents.
        groups: Its row groups that are to go into the shard.
        n_bytes: Bytes of text in them, about.
        folder: Where the shard is to be; its tokenizer is there already.
        name: Of the shard.
        fast: Whether a faster way to encode is worth looking for.
        threads: To encode in; by default as many as the machine has cores for.
    """

    texts: Path
    groups: range
    n_bytes: int
    folder: Path
    name: str
    fast: bool
    threads: int | None

    @property
    def note(self) -> Path:
        """What a finished shard leaves behind, until the store is finished."""
        return self.folder / f"{self.name}.json"


def encode(corpus: Corpus, folder: Path, processes: int) -> dict[Side, list[Shard]]:
    """Encode both sides of a corpus; shards that an interrupted call has finished are not made again.

    Args:
        corpus: The documents.
        folder: Where the tokenizer is, and the shards are to be.
        processes: To encode in. They change no byte.
    """
    _tokenizer.cache_clear()  # there may have been another in this folder
    workers = min(processes, corpus.n_bytes // SHARD)
    jobs = {side: list(_jobs(corpus, side, folder, 1 if workers > 1 else None)) for side in SIDES}
    every = [job for side in SIDES for job in jobs[side]]
    made: dict[str, Shard] = {}
    with progress_bar("encoding", sum(job.n_bytes for job in every)) as progress:
        if workers <= 1:
            made = {job.name: _made(job, progress.update) for job in every}
        else:
            with spawned(workers) as pool:
                try:
                    waiting = {pool.submit(_made, job): job for job in every}
                    for done in as_completed(waiting):
                        made[waiting[done].name] = done.result()
                        progress.update(waiting[done].n_bytes)
                except BaseException:  # Ctrl-C, too: shards that are not begun need not be
                    pool.shutdown(cancel_futures=True)
                    raise
    return {side: [made[job.name] for job in jobs[side]] for side in SIDES}


def clear_notes(shards: Iterable[Shard]) -> None:
    """Remove what only an interrupted ``encode`` needs."""
    for shard in shards:
        Path(shard.folder, f"{shard.name}.json").unlink(missing_ok=True)


def _jobs(corpus: Corpus, side: Side, folder: Path, threads: int | None) -> Iterator[Job]:
    texts = corpus.folder / f"{side}.parquet"
    sizes = groups(texts)
    at_least = max(SHARD, -(-sum(sizes) // MOST))
    begin = size = n = 0
    for place, n_bytes in enumerate(sizes, start=1):
        size += n_bytes
        if size >= at_least or place == len(sizes):
            fast = corpus.n_bytes >= FAST_FROM
            yield Job(texts, range(begin, place), size, folder, f"{side}-{n:05}", fast, threads)
            begin, size, n = place, 0, n + 1


def _made(job: Job, noted: Callable[[int], Any] = lambda _: None) -> Shard:
    """A shard that is there, or is made now."""
    if job.note.exists():
        found = Shard(folder=str(job.folder), **json.loads(job.note.read_text(encoding="utf-8")))
        with suppress(OSError, ValueError):  # it is not there, or it is empty
            if all(digest(found.path(part)) == found.sha256[part] for part in PARTS):
                return found
    tokenizer = _tokenizer(job.folder / TOKENIZER)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    rows: list[np.ndarray[Any, Any]] = []
    documents: list[tuple[int, int]] = []
    n_tokens = 0
    for chunk in _chunks(document.text for document in shelved(job.texts, job.groups)):
        # Of a long text, tokenizers takes more than a hundred times the memory.
        fast = job.fast or max(map(len, chunk)) > ENCODED_AT_ONCE
        sizes = [len(text.encode()) for text in chunk]
        for ids, size in zip(tokenizer.encode_many(chunk, fast, job.threads), sizes, strict=True):
            rows += [np.array([tokenizer.end_of_text], dtype), ids.astype(dtype)]
            documents.append((n_tokens, size))
            n_tokens += 1 + len(ids)
        noted(sum(sizes))
    shard = Shard.write(job.folder, job.name, np.concatenate(rows), np.array(documents, dtype="<u8"))
    with whole_file(job.note) as file:
        file.write(json.dumps(shard.about).encode())
    return shard


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    """Once a process: a proof that there is a faster way takes a second."""
    return Tokenizer.load(path)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts together as long as one large document, or as many as are encoded at once."""
    iterator = iter(texts)
    while chunk := list(islice(iterator, 1)):
        size = len(chunk[0])
        while size < ENCODED_AT_ONCE and (more := list(islice(iterator, 1))):
            chunk += more
            size += len(more[0])
        yield chunk


def progress_bar(what: str, n_bytes: float) -> "tqdm[Any]":
    """For so many bytes of text, on a terminal."""
    return tqdm(desc=what, total=int(n_bytes), unit="B", unit_scale=True, disable=None, leave=False)
