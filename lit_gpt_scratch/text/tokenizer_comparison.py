"""Compare tokenizers on held-out text."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from lit_gpt_scratch.text.tokenizer import Tokenizer

N_LONGEST_TOKENS: Final = 5
"""Number of longest tokens to show."""


def compare_tokenizers(
    kinds: Sequence[str], train_texts: Sequence[str], held_out: Sequence[str], vocab_size: int, special: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Train a tokenizer of each type and evaluate it on held-out text.

    Args:
        kinds: Tokenizer types; keys of ``TOKENIZER_KINDS``.
        train_texts: Documents to train on.
        held_out: Documents to evaluate on.
        vocab_size: Vocabulary size of each tokenizer.
        special: Special tokens in addition to the end-of-text token.

    Yields:
        A table row for each tokenizer: its type (``tokenizer``), its vocabulary size (``tokens``), the mean bytes per
        token, the fraction of unknown tokens, the fraction of the vocabulary that occurs in the held-out text
        (``used``), the training time in seconds, the encoding speed in MB/s, the longest tokens in the held-out text,
        and an example of text that encoding and decoding change (``loses``).
    """
    n_bytes = sum(len(text.encode()) for text in held_out)
    for kind in kinds:
        start = time.perf_counter()
        tokenizer = Tokenizer.train(train_texts, vocab_size, kind, special)
        training_seconds = time.perf_counter() - start
        list(tokenizer.encode_many(held_out[:1], fast=True))  # excludes the setup of the fast encoder from the timing
        start = time.perf_counter()
        ids = np.concatenate([*tokenizer.encode_many(held_out, fast=True), np.zeros(0, dtype=np.uint32)])
        encoding_seconds = time.perf_counter() - start
        counts = np.bincount(ids, minlength=tokenizer.vocab_size)
        tokens = tokenizer.tokens()
        longest = sorted(np.flatnonzero(counts), key=lambda id_: -len(tokens[id_].strip()))[:N_LONGEST_TOKENS]
        unknown = tokenizer.unknown_id
        yield {
            "tokenizer": kind,
            "tokens": f"{tokenizer.vocab_size:,}",
            "bytes per token": f"{n_bytes / max(len(ids), 1):.2f}",
            "unknown": f"{0 if unknown is None else counts[unknown] / max(len(ids), 1):.2%}",
            "used": f"{np.count_nonzero(counts) / tokenizer.vocab_size:.0%}",
            "trained in": f"{training_seconds:.1f} s",
            "MB/s": f"{n_bytes / 1e6 / encoding_seconds:.1f}",
            "longest tokens": " ".join(repr(tokens[id_]) for id_ in longest),
            "loses": tokenizer.round_trip_loss or "nothing",
        }
