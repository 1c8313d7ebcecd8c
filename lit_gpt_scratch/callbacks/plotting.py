"""Pictures for TensorBoard, drawn with Pillow: tables of shades, who looks at whom, a line."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
"""(height, width, 3)."""
BLUE, PAPER, INK, RULE = (31, 119, 180), (255, 255, 255), (30, 30, 30), (200, 200, 200)
MARGIN: Final = 12
GAMMA: Final = 0.5
"""Shades of attention go with the square root of the weights: most of them are small."""


def shade(share: float) -> tuple[int, int, int]:
    """From paper to blue; what is no number is grey."""
    if share != share:
        return RULE
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (round(paper + (full - paper) * share) for paper, full in zip(PAPER, BLUE, strict=True))
    return red, green, blue


def table(
    shares: NDArray[Any], said: Sequence[Sequence[str]], rows: Sequence[str], columns: Sequence[str], cell: int = 72
) -> Pixels:
    """Cells that are shaded and say something.

    Args:
        shares: (n, m), how dark each cell is, from 0 to 1.
        said: (n, m), what it says.
        rows: (n,) names.
        columns: (m,) names.
        cell: Width and height of a cell, in pixels.
    """
    font = ImageFont.load_default()
    left = MARGIN + round(max(font.getlength(name) for name in rows)) + 6
    top, width = 3 * MARGIN, MARGIN + cell * len(columns)
    image = Image.new("RGB", (left + width, top + cell * len(rows) + MARGIN), PAPER)
    pen = ImageDraw.Draw(image)
    for column, name in enumerate(columns):
        shown = fitting(name, font, cell)
        pen.text((left + cell * (column + 0.5), top - 6), shown, INK, font, anchor="mb")
    for row, name in enumerate(rows):
        pen.text((left - 6, top + cell * (row + 0.5)), name, INK, font, anchor="rm")
        for column in range(len(columns)):
            share = float(shares[row, column])
            corner = left + cell * column, top + cell * row
            pen.rectangle((*corner, corner[0] + cell - 1, corner[1] + cell - 1), shade(share), RULE)
            middle = corner[0] + cell / 2, corner[1] + cell / 2
            pen.text(middle, said[row][column], PAPER if share > 0.5 else INK, font, anchor="mm")
    return np.asarray(image)


def attention_maps(maps: NDArray[Any], tokens: Sequence[str], titles: Sequence[str], cell: int = 11) -> Pixels:
    """Who looks at whom, a square for each head side by side; a row is a token that looks.

    Args:
        maps: (heads, T, T) weights.
        tokens: (T,) as text.
        titles: (heads,).
        cell: Width and height of a weight, in pixels.
    """
    font = ImageFont.load_default()
    room = MARGIN + round(max(font.getlength(token) for token in tokens))
    side = cell * len(tokens)
    width, top = side + MARGIN, room + 2 * MARGIN
    image = Image.new("RGB", (room + len(titles) * width, top + side + MARGIN), PAPER)
    pen = ImageDraw.Draw(image)
    sideways = Image.new("RGB", (room, side), PAPER)  # names of columns, to be turned upright
    for place, token in enumerate(tokens):
        pen.text((room - 6, top + cell * (place + 0.5)), token, INK, font, anchor="rm")
        ImageDraw.Draw(sideways).text((0, cell * (place + 0.5)), token, INK, font, anchor="lm")
    upright = sideways.rotate(90, expand=True)
    for number, title in enumerate(titles):
        left = room + number * width
        pen.text((left, MARGIN / 2), title, INK, font)
        image.paste(upright, (left, top - room - 2))
        share = maps[number][..., None].clip(0, 1) ** GAMMA  # (T, T, 1)
        shades = np.where(np.isnan(share), RULE, PAPER + (np.array(BLUE) - PAPER) * share)
        square = Image.fromarray(shades.round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
        image.paste(square, (left, top))
        pen.rectangle((left, top, left + side - 1, top + side - 1), outline=RULE)
    return np.asarray(image)


def line(values: NDArray[Any], title: str, across: str, width: int = 640, height: int = 320) -> Pixels:
    """A curve over places that are counted from 0; gaps where a value is no number.

    Args:
        values: (n,).
        title: What they are.
        across: What is counted.
        width: In pixels.
        height: In pixels.
    """
    font = ImageFont.load_default()
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    left, right, top, bottom = 48, width - MARGIN, 2 * MARGIN, height - 3 * MARGIN
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    span = high - low or 1.0
    for tick in np.linspace(low, low + span, 5):
        y = bottom - (tick - low) / span * (bottom - top)
        pen.line((left, y, right, y), RULE)
        pen.text((left - 6, y), f"{tick:.2f}", INK, font, anchor="rm")
    last = max(len(values) - 1, 1)
    for place in sorted({round(share * last) for share in (0, 0.25, 0.5, 0.75, 1)}):
        pen.text((left + place / last * (right - left), bottom + 6), str(place), INK, font, anchor="mt")
    pen.text((left, MARGIN / 2), title, INK, font)
    pen.text(((left + right) / 2, height - MARGIN), across, INK, font, anchor="mm")
    points = [
        (left + place / last * (right - left), bottom - (value - low) / span * (bottom - top))
        for place, value in enumerate(values.tolist())
    ]
    for one, other in pairwise(points):
        if np.isfinite((*one, *other)).all():
            pen.line((*one, *other), BLUE, 2)
    return np.asarray(image)


def fitting(text: str, font: Any, width: int) -> str:
    """As much of the beginning of a text as is no wider than so many pixels."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
