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

from lit_gpt_scratch.text.atomic_files import atomic_file
from lit_gpt_scratch.text.corpus import SPLITS, CleanedCorpus, SplitName
from lit_gpt_scratch.text.parquet_io import read_parquet_documents, row_group_sizes
from lit_gpt_scratch.text.process_pool import start_process_pool
from lit_gpt_scratch.text.token_shards import SHARD_PARTS, TokenShard, sha256_file
from lit_gpt_scratch.text.tokenizer import TOKENIZER_FILE as TOKENIZER
from lit_gpt_scratch.text.tokenizer import Tokenizer

SHARD_BYTES: Final = 2**26
"""Bytes of text in a shard, about; more if there would be more than ``BATCH_DOCUMENTS`` of them."""
MAX_SHARDS: Final = 1024
BATCH_CHARACTERS: Final = 2**22
"""Characters of text."""
FAST_ENCODER_MIN_BYTES: Final = 2**25
"""Bytes of text that are worth a second of looking for a faster way to encode them."""


@dataclass(frozen=True)
class ShardJob:
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


def tokenize_corpus(corpus: CleanedCorpus, folder: Path, processes: int) -> dict[SplitName, list[TokenShard]]:
    """Encode both sides of a corpus; shards that an interrupted call has finished are not made again.

    Args:
        corpus: The documents.
        folder: Where the tokenizer is, and the shards are to be.
        processes: To encode in. They change no byte.
    """
    _tokenizer.cache_clear()  # there may have been another in this folder
    workers = min(processes, corpus.n_bytes // SHARD_BYTES)
    jobs = {side: list(_jobs(corpus, side, folder, 1 if workers > 1 else None)) for side in SPLITS}
    every = [job for side in SPLITS for job in jobs[side]]
    made: dict[str, TokenShard] = {}
    with progress_bar("encoding", sum(job.n_bytes for job in every)) as progress:
        if workers <= 1:
            made = {job.name: _made(job, progress.update) for job in every}
        else:
            with start_process_pool(workers) as pool:
                try:
                    waiting = {pool.submit(_made, job): job for job in every}
                    for done in as_completed(waiting):
                        made[waiting[done].name] = done.result()
                        progress.update(waiting[done].n_bytes)
                except BaseException:  # Ctrl-C, too: shards that are not begun need not be
                    pool.shutdown(cancel_futures=True)
                    raise
    return {side: [made[job.name] for job in jobs[side]] for side in SPLITS}


def remove_shard_notes(shards: Iterable[TokenShard]) -> None:
    """Remove what only an interrupted ``tokenize_corpus`` needs."""
    for shard in shards:
        Path(shard.folder, f"{shard.name}.json").unlink(missing_ok=True)


def _jobs(corpus: CleanedCorpus, side: SplitName, folder: Path, threads: int | None) -> Iterator[ShardJob]:
    texts = corpus.folder / f"{side}.parquet"
    sizes = row_group_sizes(texts)
    at_least = max(SHARD_BYTES, -(-sum(sizes) // MAX_SHARDS))
    begin = size = n = 0
    for place, n_bytes in enumerate(sizes, start=1):
        size += n_bytes
        if size >= at_least or place == len(sizes):
            fast = corpus.n_bytes >= FAST_ENCODER_MIN_BYTES
            yield ShardJob(texts, range(begin, place), size, folder, f"{side}-{n:05}", fast, threads)
            begin, size, n = place, 0, n + 1


def _made(job: ShardJob, noted: Callable[[int], Any] = lambda _: None) -> TokenShard:
    """A shard that is there, or is made now."""
    if job.note.exists():
        found = TokenShard(folder=str(job.folder), **json.loads(job.note.read_text(encoding="utf-8")))
        with suppress(OSError, ValueError):  # it is not there, or it is empty
            if all(sha256_file(found.path(part)) == found.sha256[part] for part in SHARD_PARTS):
                return found
    tokenizer = _tokenizer(job.folder / TOKENIZER)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    rows: list[np.ndarray[Any, Any]] = []
    documents: list[tuple[int, int]] = []
    n_tokens = 0
    for chunk in _chunks(document.text for document in read_parquet_documents(job.texts, job.groups)):
        # Of a long text, tokenizers takes more than a hundred times the memory.
        fast = job.fast or max(map(len, chunk)) > BATCH_CHARACTERS
        sizes = [len(text.encode()) for text in chunk]
        for ids, size in zip(tokenizer.encode_many(chunk, fast, job.threads), sizes, strict=True):
            rows += [np.array([tokenizer.end_of_text], dtype), ids.astype(dtype)]
            documents.append((n_tokens, size))
            n_tokens += 1 + len(ids)
        noted(sum(sizes))
    shard = TokenShard.write(job.folder, job.name, np.concatenate(rows), np.array(documents, dtype="<u8"))
    with atomic_file(job.note) as file:
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
        while size < BATCH_CHARACTERS and (more := list(islice(iterator, 1))):
            chunk += more
            size += len(more[0])
        yield chunk


def progress_bar(what: str, n_bytes: float) -> "tqdm[Any]":
    """For so many bytes of text, on a terminal."""
    return tqdm(desc=what, total=int(n_bytes), unit="B", unit_scale=True, disable=None, leave=False)
