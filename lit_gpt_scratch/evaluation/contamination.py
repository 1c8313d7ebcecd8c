"""How much of a benchmark stands in the text that a model was trained on."""

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


def iterate_training_documents(source: str, text_column: str = "text") -> Iterator[str]:
    """The documents of a source; of a folder that ``prepare --data.store`` made, those for training.

    Raises:
        UserError: It is missing or cannot be read.
    """
    from lit_gpt_scratch.data.token_store import (  # with data comes Lightning, which takes seconds
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
    """Which texts have a run of words in common with a document that was trained on.

    As for GPT-3 (https://arxiv.org/abs/2005.14165, section 4 and appendix C): 13 words, without case and punctuation;
    of a shorter text all of it. One of fewer than 8 is as likely a common phrase: it counts only where it is a whole
    document, as in ``Leakage``. A run is known by 8 bytes: with 10**10 of them in training and 10**6 in the benchmark,
    two different ones are taken for the same with a chance of one in 2,000.

    Args:
        texts: The benchmark's, (N,).
        training: Documents, read once.
        words: Words in a run.

    Returns:
        (N,) bool. A text without a word is in nothing.
    """
    known: dict[int, tuple[list[NDArray[np.uint64]], list[int]]] = {}
    short: dict[tuple[str, ...], list[int]] = {}
    for number, text in enumerate(texts):
        said = normalized_words(text)
        codes, length = hash_words(said), min(len(said), words)
        if 0 < length < min(Leakage.least, words):
            short.setdefault(tuple(said), []).append(number)
        elif length:
            runs, owners = known.setdefault(length, ([], []))
            runs.append(np.unique(hash_ngrams(codes, length)))
            owners += [number] * len(runs[-1])
    tables = {length: _sort_ngrams(np.concatenate(runs), np.array(owners)) for length, (runs, owners) in known.items()}
    found = np.zeros(len(texts), dtype=bool)
    with tqdm(training, desc="searching what was trained on", unit="", delay=2, leave=False, disable=None) as bar:
        for document in bar:
            said = normalized_words(document)
            codes = hash_words(said)
            found[short.get(tuple(said), [])] = True
            for length, (sorted_runs, owner) in tables.items():
                there = np.unique(hash_ngrams(codes, length))
                first, last = (np.searchsorted(sorted_runs, there, side) for side in ("left", "right"))
                for begin, end in zip(first[first < last], last[first < last], strict=True):
                    found[owner[begin:end]] = True
    return found


def _sort_ngrams(runs: NDArray[np.uint64], owner: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    order = np.argsort(runs, kind="stable")
    return runs[order], owner[order]
