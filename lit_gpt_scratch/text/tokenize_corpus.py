"""Tokenize a corpus in parallel, and write each shard atomically."""

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

from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.text.atomic_files import write_atomically
from lit_gpt_scratch.text.corpus import SPLITS, CleanedCorpus, SplitName
from lit_gpt_scratch.text.parquet_io import read_parquet_documents, row_group_sizes
from lit_gpt_scratch.text.process_pool import start_process_pool
from lit_gpt_scratch.text.token_shards import SHARD_PARTS, TokenShard, sha256_file
from lit_gpt_scratch.text.tokenizer import TOKENIZER_FILE, Tokenizer

SHARD_BYTES: Final = 2**26
"""Approximate bytes of text per shard; shards are larger if a split would otherwise have over ``MAX_SHARDS`` shards."""
MAX_SHARDS: Final = 1024
BATCH_CHARACTERS: Final = 2**22
"""Minimum number of characters to encode at a time."""
FAST_ENCODER_MIN_BYTES: Final = 2**25
"""Minimum corpus size, in bytes, for using the fast encoder, whose setup takes about a second."""


@dataclass(frozen=True)
class ShardJob:
    """Specification of a shard to write.

    Attributes:
        texts: Parquet file that contains the documents.
        row_groups: Row groups to include in the shard.
        n_bytes: Approximate bytes of text in the row groups.
        folder: Folder for the shard, which must already contain the tokenizer.
        name: Name of the shard.
        fast: Whether to use the fast encoder if it supports the tokenizer.
        threads: Number of threads for the fast encoder; None uses the default of ``ThreadPoolExecutor``.
    """

    texts: Path
    row_groups: range
    n_bytes: int
    folder: Path
    name: str
    fast: bool
    threads: int | None

    @property
    def marker(self) -> Path:
        """Path to the metadata file, which is written with the shard and deleted once the token store is complete."""
        return self.folder / f"{self.name}.json"


def tokenize_corpus(corpus: CleanedCorpus, folder: Path, processes: int) -> dict[SplitName, list[TokenShard]]:
    """Tokenize both splits of a corpus, reusing shards that an earlier, interrupted call completed.

    Args:
        corpus: The corpus to tokenize.
        folder: Output folder, which must already contain the tokenizer.
        processes: Maximum number of worker processes; does not affect the result.
    """
    _load_tokenizer.cache_clear()  # the folder may have contained another tokenizer
    workers = min(processes, corpus.n_bytes // SHARD_BYTES)
    jobs = {split: list(_make_jobs(corpus, split, folder, 1 if workers > 1 else None)) for split in SPLITS}
    all_jobs = [job for split in SPLITS for job in jobs[split]]
    shards: dict[str, TokenShard] = {}
    with progress_bar("encoding", sum(job.n_bytes for job in all_jobs)) as progress:
        if workers <= 1:
            shards = {job.name: _run_job(job, progress.update) for job in all_jobs}
        else:
            with start_process_pool(workers) as pool:
                try:
                    futures = {pool.submit(_run_job, job): job for job in all_jobs}
                    for future in as_completed(futures):
                        shards[futures[future].name] = future.result()
                        progress.update(futures[future].n_bytes)
                except BaseException:  # includes Ctrl-C: do not start the remaining shards
                    pool.shutdown(cancel_futures=True)
                    raise
    return {split: [shards[job.name] for job in jobs[split]] for split in SPLITS}


def remove_shard_markers(shards: Iterable[TokenShard]) -> None:
    """Remove marker files, which are only used to resume an interrupted ``tokenize_corpus``."""
    for shard in shards:
        Path(shard.folder, f"{shard.name}.json").unlink(missing_ok=True)


def _make_jobs(corpus: CleanedCorpus, split: SplitName, folder: Path, threads: int | None) -> Iterator[ShardJob]:
    texts = corpus.folder / f"{split}.parquet"
    sizes = row_group_sizes(texts)
    min_bytes = max(SHARD_BYTES, -(-sum(sizes) // MAX_SHARDS))
    first = size = n = 0
    for stop, n_bytes in enumerate(sizes, start=1):
        size += n_bytes
        if size >= min_bytes or stop == len(sizes):
            fast = corpus.n_bytes >= FAST_ENCODER_MIN_BYTES
            yield ShardJob(texts, range(first, stop), size, folder, f"{split}-{n:05}", fast, threads)
            first, size, n = stop, 0, n + 1


def _run_job(job: ShardJob, on_progress: Callable[[int], Any] = lambda _: None) -> TokenShard:
    """Return the existing shard if it is complete and its checksums match; otherwise write it."""
    if job.marker.exists():
        with suppress(OSError, ValueError):  # a file is missing, empty or corrupted
            shard = TokenShard.from_metadata(job.folder, read_json(job.marker, dict[str, Any]), job.marker.name)
            if shard.name == job.name and all(
                sha256_file(shard.path(part)) == shard.sha256[part] for part in SHARD_PARTS
            ):
                return shard
    tokenizer = _load_tokenizer(job.folder / TOKENIZER_FILE)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    tokens: list[np.ndarray[Any, Any]] = []
    documents: list[tuple[int, int]] = []
    n_tokens = 0
    for batch in _make_batches(document.text for document in read_parquet_documents(job.texts, job.row_groups)):
        # For a long document, tokenizers requires over a hundred times the size of the document in memory.
        fast = job.fast or max(map(len, batch)) > BATCH_CHARACTERS
        sizes = [len(text.encode()) for text in batch]
        for ids, size in zip(tokenizer.encode_many(batch, fast, job.threads), sizes, strict=True):
            tokens += [np.array([tokenizer.end_of_text], dtype), ids.astype(dtype)]
            documents.append((n_tokens, size))
            n_tokens += 1 + len(ids)
        on_progress(sum(sizes))
    shard = TokenShard.write(job.folder, job.name, np.concatenate(tokens), np.array(documents, dtype="<u8"))
    write_atomically(job.marker, json.dumps(shard.metadata))
    return shard


@lru_cache(maxsize=1)
def _load_tokenizer(path: Path) -> Tokenizer:
    """Load and cache a tokenizer, because setting up its fast encoder takes about a second."""
    return Tokenizer.load(path)


def _make_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group strings into batches; a batch is complete once it has at least ``BATCH_CHARACTERS`` characters."""
    iterator = iter(texts)
    while batch := list(islice(iterator, 1)):
        size = len(batch[0])
        while size < BATCH_CHARACTERS and (more := list(islice(iterator, 1))):
            batch += more
            size += len(more[0])
        yield batch


def progress_bar(description: str, n_bytes: float) -> "tqdm[Any]":
    """Return a progress bar over bytes of text, shown only in a terminal."""
    return tqdm(desc=description, total=int(n_bytes), unit="B", unit_scale=True, disable=None, leave=False)
