"""How well a model predicts a text."""

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
"""Of which those of a length are put together."""


def split_into_windows(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows that predict each token of a text once, the first of them excepted.

    Each begins ``stride`` tokens behind the one before it, and predicts what that has not: all of the first window,
    then ``stride`` tokens with ``window - stride`` before them as context, at least.

    Args:
        n_tokens: Of the text, the start of text included.
        window: The most tokens that a model reads at once.
        stride: From 1, the most context and the most work, to ``window``, no token read twice.

    Yields:
        First token, the token behind the last, and how many of the last are predicted.
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
    """Predict whole documents: every byte of each, with no context from another document.

    A document is preceded by the start of text and cut into windows; each of its tokens is predicted once. That the
    document ends is not scored.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        texts: Documents.
        window: Tokens that are read at once; by default, and at most, the model's ``block_size``.
        stride: As for ``split_into_windows``; by default as long as a window.

    Returns:
        ``loss`` (nats per token), ``perplexity`` (per token), ``bits_per_byte``; and ``tokens``, ``bytes``. The bytes
        of a window are what the tokenizer says of its tokens, in proportion to what the document has.

    Raises:
        UserError: The window is longer than the context, or the stride than the window.
    """
    window = model.block_size if window is None else window
    stride = window if stride is None else stride
    if not 1 <= window <= model.block_size:
        raise UserError(f"argument --window: {window} is not between 1 and the model's context, {model.block_size}")
    if not 1 <= stride <= window:
        raise UserError(f"argument --stride: {stride} is not between 1 and the window, {window}")
    token_bytes = np.array(tokenizer.token_bytes())
    row: list[int] = []
    tokens: list[int] = []
    n_bytes: list[float] = []

    def tails() -> Iterator[ScoredSequence]:
        with tqdm(desc="scoring", unit="B", unit_scale=True, delay=2, leave=False, disable=None) as bar:
            for number, text in enumerate(texts):
                ids = [tokenizer.start_of_text, *tokenizer.encode(text)]
                # Of a text that the tokenizer has no tokens for nothing is predicted, but its bytes count.
                cut = list(split_into_windows(len(ids), window, stride)) or [(0, 1, 0)]
                sizes = [int(token_bytes[ids[stop - scored : stop]].sum()) for _, stop, scored in cut]
                size = len(text.encode())
                for (start, stop, scored), its in zip(cut, sizes, strict=True):
                    row.append(number)
                    tokens.append(scored)
                    n_bytes.append(size * (its / sum(sizes) if sum(sizes) else 1 / len(cut)))
                    yield ScoredSequence(ids[start:stop], scored)
                bar.update(size)

    nats: list[float] = []
    pending = tails()
    while batch := list(islice(pending, WINDOWS_PER_BATCH)):
        nats += [-said.nats for said in compute_loglikelihoods(model, batch, progress=False)]
    columns = np.array([nats, tokens, n_bytes])  # (3, windows)

    def metrics(places: PartIndices) -> Metrics:
        sums = columns[:, places].sum(1)
        return likelihood_rates(*map(float, sums))

    def extra(places: PartIndices) -> dict[str, int]:
        return {"tokens": round(columns[1, places].sum()), "bytes": round(columns[2, places].sum())}

    limits = {"loss": (0.0, math.inf), "perplexity": (1.0, math.inf), "bits_per_byte": (0.0, math.inf)}
    return Measurements(np.array(row, dtype=np.intp), 1 + max(row, default=-1), metrics, extra=extra, limits=limits)


def score_documents(
    model: GPT, tokenizer: Tokenizer, texts: Iterable[str], window: int | None = None, stride: int | None = None
) -> dict[str, float | int]:
    """``loss``, ``perplexity``, ``bits_per_byte``, ``tokens`` and ``bytes`` of documents, as plain numbers."""
    measured = evaluate_perplexity(model, tokenizer, texts, window, stride)
    everything = np.arange(len(measured.row))
    return {**measured.metrics(everything), **measured.extra(everything)}
