"""Detect benchmark contamination: benchmark texts that share word n-grams with the training data."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lit_gpt_scratch.text.decontamination import Leakage, hash_ngrams, hash_words, normalized_words
from lit_gpt_scratch.text.sources import read_documents
from lit_gpt_scratch.text.token_shards import MANIFEST_FILE

if TYPE_CHECKING:
    from lit_gpt_scratch.data.token_store import TokenStore

NGRAM_WORDS: Final = 13
"""Number of words per n-gram."""


def iterate_training_documents(source: str, text_column: str = "text") -> Iterator[str]:
    """Iterate over the training documents in a source.

    Args:
        source: Document source, or token store written by ``prepare --data.store``. The validation documents of a token
            store are skipped.
        text_column: Name of the column that contains the text; ignored for a token store.

    Raises:
        UserError: The source is missing or cannot be read.
    """
    from lit_gpt_scratch.data.token_store import TokenStore  # data imports Lightning, which takes seconds

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
    """Find the benchmark texts that share a word n-gram with a training document.

    The method is the same as for GPT-3 (https://arxiv.org/abs/2005.14165, section 4 and appendix C). N-grams have 13
    words by default; a shorter text is a single n-gram. Case and punctuation are ignored. A text with fewer than 8
    words may be a common phrase, so it counts as contaminated only if it equals an entire training document, as in
    ``Leakage``. N-grams are compared by their 8-byte hashes. With 10**10 n-grams in the training data and 10**6 in the
    benchmark, the probability of a collision is 1 in 2,000.

    Args:
        texts: N benchmark texts.
        training: Training documents, which are read once.
        words: Number of words per n-gram.

    Returns:
        Mask of the contaminated texts, bool array of shape (N,). A text without words is not contaminated.
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
    """Sort n-grams together with the indices of the texts that contain them."""
    order = np.argsort(ngrams, kind="stable")
    return ngrams[order], owner[order]
