"""Packed windows for the eye: where documents begin, what attention sees, what is a label."""

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

COLOURS: Final = (36, 33, 35, 32, 34)
"""ANSI's cyan, yellow, magenta, green and blue, for one document after the other."""
PLAIN, DIM, INVERSE, STRUCK = 0, 2, 7, 9
CELLS: Final = 24
"""Rows and columns in which a mask is drawn, at most."""
LEGEND: Final = (
    "Another colour is another document; inverse is an end of text; struck through, or in « » without colours, has no "
    "label. Below each window its attention: a row of cells is a stretch of tokens, █ what it sees."
)


def supports_colors() -> bool:
    """Whether standard output is a terminal that takes them, or is told to (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and (bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty())


def render_windows(data: PackedText, n: int, colours: bool) -> Iterator[str]:
    """The first windows of the training, in their order, as paragraphs.

    Args:
        data: Set up.
        n: How many.
        colours: Whether the terminal has them.
    """
    yield LEGEND
    order = data.order.windows  # of windows: there may be too few for a batch
    for index in order.windows(0, np.arange(min(n, len(order)))).tolist():
        window = data.train_dataset[index]
        # Without a mask attention tells no documents apart, but there are documents.
        ids = window["input_ids"][0]
        masked = "document_ids" in window
        documents = window["document_ids"][0] if masked else (ids == data.tokenizer.end_of_text).cumsum(0)
        seen = documents if masked else torch.zeros_like(ids)
        filled = torch.arange(len(ids)) >= sum(length for _, length in data.train_dataset.pieces(index)[1])
        n_documents, n_labels = len(set(documents[~filled].tolist())), int((window["labels"] != IGNORE_INDEX).sum())
        yield (
            f"window {index:,} of {len(data.train_dataset):,}: {n_documents} document{'s' * (n_documents != 1)}, "
            f"{n_labels} labels, {int(filled.sum())} positions filled up"
        )
        yield "".join(_text(data, window, documents, filled.tolist(), colours))
        yield "\n".join(_mask(seen, documents, colours))


def _text(data: PackedText, window: Batch, documents: Tensor, filled: Sequence[bool], colours: bool) -> Iterator[str]:
    ids, labels = window["input_ids"][0].tolist(), window["labels"][0].tolist()
    begin = 0
    for place in range(1, len(ids) + 1):
        alike = place < len(ids) and (documents[place], labels[place] == IGNORE_INDEX, filled[place]) == (
            documents[begin], labels[begin] == IGNORE_INDEX, filled[begin]
        )  # fmt: skip
        if alike and data.tokenizer.end_of_text not in (ids[place], ids[place - 1]):
            continue
        stretch = ids[begin:place]
        if filled[begin]:
            yield _styled("·", colours, DIM)
        else:
            unlabelled = labels[begin] == IGNORE_INDEX
            text = data.tokenizer.decode(stretch).replace("\n", "↵\n")
            style = [COLOURS[int(documents[begin]) % len(COLOURS)]]
            style += [INVERSE] * (stretch[0] == data.tokenizer.end_of_text) + [STRUCK] * unlabelled
            yield ("\n" if begin and documents[begin] != documents[begin - 1] else "") + (
                f"«{text}»" if unlabelled and not colours else _styled(text, colours, *style)
            )
        begin = place


def _mask(seen: Tensor, documents: Tensor, colours: bool) -> Iterator[str]:
    """Who sees whom, cells of neighbouring tokens together."""
    T = len(seen)
    place = torch.arange(T)
    sees = (seen[:, None] == seen[None, :]) & (place[:, None] >= place)  # (T, T)
    borders = torch.linspace(0, T, min(T, CELLS) + 1).long().tolist()
    spans = list(pairwise(borders))
    for top, bottom in spans:
        cells = [
            _styled("██", colours, COLOURS[int(documents[left]) % len(COLOURS)])
            if sees[top:bottom, left:right].any()
            else _styled("· ", colours, DIM)
            for left, right in spans
        ]
        yield "".join(cells)


def _styled(text: str, colours: bool, *codes: int) -> str:
    if not colours:
        return text
    begin = f"\x1b[{';'.join(map(str, codes))}m"
    return "\n".join(f"{begin}{line}\x1b[{PLAIN}m" if line else "" for line in text.split("\n"))
