"""Compute the loss, perplexity and bits per byte of documents with a sliding window."""

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
from tqdm import tqdm

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation.intervals import Measurements, Metrics, PartIndices
from lit_gpt_scratch.evaluation.loglikelihood import ScoredSequence, compute_loglikelihoods
from lit_gpt_scratch.losses.metrics import likelihood_rates
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.tokenizer import Tokenizer

WINDOWS_PER_BATCH = 1024
"""Maximum number of windows to collect before they are sorted by length and divided into batches."""


def split_into_windows(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Split a document into windows such that each token except the first is scored exactly once.

    Each window begins ``stride`` tokens after the previous window, and only tokens that have not been scored yet are
    scored. In the first window, all tokens except the first are scored; in each later window, up to ``stride`` tokens
    are scored, with at least ``window - stride`` tokens of context.

    Args:
        n_tokens: Number of tokens in the document, including the start-of-text token.
        window: Maximum number of input tokens per window.
        stride: Number of tokens between the beginnings of two consecutive windows, from 1 (most context and compute) to
            ``window`` (no overlap).

    Yields:
        For each window, the index of its first token, the index one past its last token, and the number of tokens
        to score at its end.
    """
    predicted = 1
    for start in range(0, n_tokens, stride):
        stop = min(start + window + 1, n_tokens)
        if stop > predicted:
            yield start, stop, stop - predicted
            predicted = stop


def evaluate_perplexity(
    model: GPT, tokenizer: Tokenizer, texts: Iterable[str], window: int | None = None, stride: int | None = None
) -> Measurements:
    """Compute the loss, perplexity and bits per byte of whole documents, without context from other documents.

    Each document is preceded by the start-of-text token and split into windows, and each of its tokens is scored once.
    The end-of-text token after the document is not scored.

    Args:
        model: The language model, in evaluation mode.
        tokenizer: The model's tokenizer.
        texts: Documents.
        window: Number of input tokens per window. The default and maximum is the model's ``block_size``.
        stride: Number of tokens between the beginnings of two consecutive windows; equal to ``window`` by default.

    Returns:
        ``loss`` (nats per token), ``perplexity`` (per token) and ``bits_per_byte``; and the counts ``tokens`` and
        ``bytes``. The bytes of a document are distributed over its tokens; see ``text.text_bytes``.

    Raises:
        UserError: The window is longer than the context, or the stride is longer than the window.
    """
    window = model.block_size if window is None else window
    stride = window if stride is None else stride
    if not 1 <= window <= model.block_size:
        raise UserError(f"argument --window: {window} is not between 1 and the context length, {model.block_size}")
    if not 1 <= stride <= window:
        raise UserError(f"argument --stride: {stride} is not between 1 and the window length, {window}")
    row: list[int] = []
    tokens: list[int] = []
    n_bytes: list[int] = []

    def sequences() -> Iterator[ScoredSequence]:
        with tqdm(desc="scoring", unit="B", unit_scale=True, delay=2, leave=False, disable=None) as bar:
            for number, text in enumerate(texts):
                ids = [tokenizer.start_of_text, *tokenizer.encode(text)]
                # In a document without tokens, no token is scored, but the bytes are counted.
                spans = list(split_into_windows(len(ids), window, stride)) or [(0, 1, 0)]
                size = len(text.encode())
                sizes = tokenizer.distribute_bytes(ids[1:], size) if len(ids) > 1 else np.array([size])
                for start, stop, scored in spans:
                    row.append(number)
                    tokens.append(scored)
                    n_bytes.append(int(sizes[stop - 1 - scored : stop - 1].sum()) if scored else size)
                    yield ScoredSequence(ids[start:stop], scored)
                bar.update(size)

    nats: list[float] = []
    pending = sequences()
    while batch := list(islice(pending, WINDOWS_PER_BATCH)):
        nats += [-score.nats for score in compute_loglikelihoods(model, batch, progress=False)]
    columns = np.array([nats, tokens, n_bytes])  # (3, windows)

    def metrics(indices: PartIndices) -> Metrics:
        sums = columns[:, indices].sum(1)
        return likelihood_rates(*map(float, sums))

    def extra(indices: PartIndices) -> dict[str, int]:
        return {"tokens": round(columns[1, indices].sum()), "bytes": round(columns[2, indices].sum())}

    limits = {"loss": (0.0, math.inf), "perplexity": (1.0, math.inf), "bits_per_byte": (0.0, math.inf)}
    return Measurements(np.array(row, dtype=np.intp), 1 + max(row, default=-1), metrics, extra=extra, limits=limits)


def score_documents(
    model: GPT, tokenizer: Tokenizer, texts: Iterable[str], window: int | None = None, stride: int | None = None
) -> dict[str, float | int]:
    """Return the metrics and counts of ``evaluate_perplexity`` over all documents, keyed by name."""
    measured = evaluate_perplexity(model, tokenizer, texts, window, stride)
    indices = np.arange(len(measured.row))
    return {**measured.metrics(indices), **measured.extra(indices)}
