"""Print packed training windows with their document boundaries, attention masks and labels."""

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX, Batch
from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.terminal_output import escape_terminal

COLORS: Final = (36, 33, 35, 32, 34)
"""ANSI codes for cyan, yellow, magenta, green and blue; consecutive documents cycle through them."""
PLAIN, DIM, INVERSE, STRUCK = 0, 2, 7, 9
CELLS: Final = 24
"""Maximum number of cells in each row and column of a drawn attention mask."""
LEGEND: Final = (
    "Each document has its own color; end-of-text tokens are inverted; text without labels is struck through, or "
    "enclosed in « » without colors. The attention mask is below each window: each row of cells is a span of query "
    "tokens, and █ marks the keys that these queries attend to."
)


def supports_colors() -> bool:
    """Return whether to print colors: on a terminal by default; ``NO_COLOR`` and ``FORCE_COLOR`` take precedence."""
    return not os.environ.get("NO_COLOR") and (bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty())


def render_windows(data: PackedText, n: int, colors: bool) -> Iterator[str]:
    """Render the first training windows in training order, as paragraphs of text with control characters escaped.

    Args:
        data: Data module after ``setup``.
        n: Number of windows.
        colors: Whether to use ANSI colors.
    """
    yield LEGEND
    order = data.train_sampler.order  # of windows, not of batches, because there may be too few windows to fill a batch
    for index in order.rows(0, np.arange(min(n, len(order)))).tolist():
        window = data.train_dataset[index]
        # Without a document mask the batch has no document ids, so count end-of-text tokens.
        ids = window["input_ids"][0]
        masked = "document_ids" in window
        documents = window["document_ids"][0] if masked else (ids == data.tokenizer.end_of_text).cumsum(0)
        seen = documents if masked else torch.zeros_like(ids)
        padded = torch.arange(len(ids)) >= sum(length for _, length in data.train_dataset.pieces(index)[1])
        n_documents, n_labels = len(set(documents[~padded].tolist())), int((window["labels"] != IGNORE_INDEX).sum())
        yield (
            f"window {index:,} of {len(data.train_dataset):,}: {n_documents} document{'s' * (n_documents != 1)}, "
            f"{n_labels} labels, {int(padded.sum())} padding positions"
        )
        yield "".join(_render_text(data, window, documents, padded.tolist(), colors))
        yield "\n".join(_render_mask(seen, documents, colors))


def _render_text(
    data: PackedText, window: Batch, documents: Tensor, padded: Sequence[bool], colors: bool
) -> Iterator[str]:
    ids, labels = window["input_ids"][0].tolist(), window["labels"][0].tolist()
    begin = 0
    for place in range(1, len(ids) + 1):
        same_style = place < len(ids) and (documents[place], labels[place] == IGNORE_INDEX, padded[place]) == (
            documents[begin], labels[begin] == IGNORE_INDEX, padded[begin]
        )  # fmt: skip
        if same_style and data.tokenizer.end_of_text not in (ids[place], ids[place - 1]):
            continue
        span = ids[begin:place]
        if padded[begin]:
            yield _style("·", colors, DIM)
        else:
            unlabelled = labels[begin] == IGNORE_INDEX
            text = escape_terminal(data.tokenizer.decode(span)).replace("\n", "↵\n")
            style = [COLORS[int(documents[begin]) % len(COLORS)]]
            style += [INVERSE] * (span[0] == data.tokenizer.end_of_text) + [STRUCK] * unlabelled
            yield ("\n" if begin and documents[begin] != documents[begin - 1] else "") + (
                f"«{text}»" if unlabelled and not colors else _style(text, colors, *style)
            )
        begin = place


def _render_mask(seen: Tensor, documents: Tensor, colors: bool) -> Iterator[str]:
    """Draw the attention mask; each cell represents a block of query and key tokens."""
    T = len(seen)
    place = torch.arange(T)
    sees = (seen[:, None] == seen[None, :]) & (place[:, None] >= place)  # (T, T)
    borders = torch.linspace(0, T, min(T, CELLS) + 1).long().tolist()
    spans = list(pairwise(borders))
    for top, bottom in spans:
        cells = [
            _style("██", colors, COLORS[int(documents[left]) % len(COLORS)])
            if sees[top:bottom, left:right].any()
            else _style("· ", colors, DIM)
            for left, right in spans
        ]
        yield "".join(cells)


def _style(text: str, colors: bool, *codes: int) -> str:
    if not colors:
        return text
    begin = f"\x1b[{';'.join(map(str, codes))}m"
    return "\n".join(f"{begin}{line}\x1b[{PLAIN}m" if line else "" for line in text.split("\n"))
