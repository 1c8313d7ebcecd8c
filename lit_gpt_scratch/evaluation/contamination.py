"""Benchmark contamination: which texts share n-grams of words with the training data."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lit_gpt_scratch.text.decontamination import Leakage, hash_ngrams, hash_words, normalized_words
from lit_gpt_scratch.text.sources import read_documents

if TYPE_CHECKING:
    from lit_gpt_scratch.data.token_store import TokenStore

NGRAM_WORDS: Final = 13
"""Words per n-gram."""


def iterate_training_documents(source: str, text_column: str = "text") -> Iterator[str]:
    """Documents of a source; for a token store of ``prepare --data.store``, its training documents.

    Raises:
        UserError: The source is missing or cannot be read.
    """
    from lit_gpt_scratch.data.token_store import (  # data imports Lightning, which takes seconds
        MANIFEST_FILE,
        TokenStore,
    )

    if not Path(source, MANIFEST_FILE).is_file():
        return (document.text for document in read_documents(source, text_column))
    return _decode_store(TokenStore.open(Path(source)))


def _decode_store(store: "TokenStore") -> Iterator[str]:
    for shard in store.train.shards:
        ends = [*shard.documents[1:, 0].tolist(), shard.n_tokens]
        for start, end in zip(shard.documents[:, 0].tolist(), ends, strict=True):
            ids = shard.tokens[start:end]
            yield store.tokenizer.decode(ids[ids != store.tokenizer.end_of_text].tolist())


def find_contaminated(texts: Sequence[str], training: Iterable[str], words: int = NGRAM_WORDS) -> NDArray[np.bool_]:
    """Find the texts that share an n-gram of words with a training document.

    As for GPT-3 (https://arxiv.org/abs/2005.14165, section 4 and appendix C): 13 words, without case and punctuation,
    or all words of a shorter text. A text of fewer than 8 words may be a common phrase: it only counts if it equals a
    whole document, as in ``Leakage``. N-grams are compared by hashes of 8 bytes: with 10**10 of them in the training
    data and 10**6 in the benchmark, the probability of a collision is one in 2,000.

    Args:
        texts: N texts of the benchmark.
        training: Training documents, read once.
        words: Words per n-gram.

    Returns:
        (N,) bool. A text without a word is not contaminated.
    """
    by_length: dict[int, tuple[list[NDArray[np.uint64]], list[int]]] = {}
    short: dict[tuple[str, ...], list[int]] = {}
    for index, text in enumerate(texts):
        text_words = normalized_words(text)
        hashes, length = hash_words(text_words), min(len(text_words), words)
        if 0 < length < min(Leakage.least, words):
            short.setdefault(tuple(text_words), []).append(index)
        elif length:
            ngrams, owners = by_length.setdefault(length, ([], []))
            ngrams.append(np.unique(hash_ngrams(hashes, length)))
            owners += [index] * len(ngrams[-1])
    tables = {
        length: _sort_ngrams(np.concatenate(ngrams), np.array(owners)) for length, (ngrams, owners) in by_length.items()
    }
    found = np.zeros(len(texts), dtype=bool)
    with tqdm(training, desc="searching the training data", unit="", delay=2, leave=False, disable=None) as bar:
        for document in bar:
            document_words = normalized_words(document)
            hashes = hash_words(document_words)
            found[short.get(tuple(document_words), [])] = True
            for length, (sorted_ngrams, owner) in tables.items():
                candidates = np.unique(hash_ngrams(hashes, length))
                first, last = (np.searchsorted(sorted_ngrams, candidates, side) for side in ("left", "right"))
                for begin, end in zip(first[first < last], last[first < last], strict=True):
                    found[owner[begin:end]] = True
    return found


def _sort_ngrams(ngrams: NDArray[np.uint64], owner: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Sort n-grams together with the indices of the texts that they are from."""
    order = np.argsort(ngrams, kind="stable")
    return ngrams[order], owner[order]
