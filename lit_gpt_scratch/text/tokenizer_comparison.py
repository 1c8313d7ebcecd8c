"""Tokenizers side by side, on text that none of them has learned from."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from lit_gpt_scratch.text.tokenizer import Tokenizer

MAX_LONGEST_TOKENS: Final = 5
"""How many of the longest tokens to name."""


def compare_tokenizers(
    kinds: Sequence[str], learned_from: Sequence[str], held_out: Sequence[str], vocab_size: int, special: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Train a tokenizer of each kind, and measure it.

    Args:
        kinds: Keys of ``training.KINDS``.
        learned_from: Texts to train on.
        held_out: Texts to measure on.
        vocab_size: Tokens to ask for.
        special: Special tokens beside the end of text.

    Yields:
        A row: ``tokenizer``, ``tokens`` in its vocabulary, ``bytes per token``, ``unknown`` as a share of tokens,
        ``used`` as a share of the vocabulary, ``trained in`` seconds, ``MB/s`` of encoding, ``longest tokens`` that
        occur, spaces not counted, and ``loses``, what does not come back.
    """
    n_bytes = sum(len(text.encode()) for text in held_out)
    for kind in kinds:
        began = time.perf_counter()
        tokenizer = Tokenizer.train(learned_from, vocab_size, kind, special)
        trained = time.perf_counter() - began
        list(tokenizer.encode_many(held_out[:1], fast=True))  # the proof is not what is measured
        began = time.perf_counter()
        ids = np.concatenate([*tokenizer.encode_many(held_out, fast=True), np.zeros(0, dtype=np.uint32)])
        encoded = time.perf_counter() - began
        counts = np.bincount(ids, minlength=tokenizer.vocab_size)
        tokens = tokenizer.tokens()
        longest = sorted(np.flatnonzero(counts), key=lambda token_id: -len(tokens[token_id].strip()))[
            :MAX_LONGEST_TOKENS
        ]
        unknown = tokenizer.unknown
        yield {
            "tokenizer": kind,
            "tokens": f"{tokenizer.vocab_size:,}",
            "bytes per token": f"{n_bytes / max(len(ids), 1):.2f}",
            "unknown": f"{0 if unknown is None else counts[unknown] / max(len(ids), 1):.2%}",
            "used": f"{np.count_nonzero(counts) / tokenizer.vocab_size:.0%}",
            "trained in": f"{trained:.1f} s",
            "MB/s": f"{n_bytes / 1e6 / encoded:.1f}",
            "longest tokens": " ".join(repr(tokens[token_id]) for token_id in longest),
            "loses": tokenizer.loss or "nothing",
        }
