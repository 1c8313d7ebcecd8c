"""Heat maps, attention maps and line plots for TensorBoard, drawn with Pillow.

After every validation run, one figure of attention maps is drawn for each of up to four layers. On a single busy CPU
core, Pillow takes 0.03 s per figure; Matplotlib would take 0.9 s.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lit_gpt_scratch.terminal_output import escape_line

Pixels = NDArray[np.uint8]
"""RGB image as a (height, width, 3) uint8 array."""
BLUE, WHITE, BLACK, GREY = (31, 119, 180), (255, 255, 255), (30, 30, 30), (200, 200, 200)
MARGIN: Final = 12
GAMMA: Final = 0.5
"""Exponent applied to attention weights before coloring; the square root makes small weights visible."""
COLOR_BAR_TICKS: Final = (0.0, 0.05, 0.25, 0.5, 1.0)


def blend(share: float) -> tuple[int, int, int]:
    """Return the color of a value between 0 (white) and 1 (blue); other values are clipped, and NaN is gray."""
    if share != share:
        return GREY
    share = min(max(share, 0.0), 1.0)
    red, green, blue = (round(white + (full - white) * share) for white, full in zip(WHITE, BLUE, strict=True))
    return red, green, blue


def heat_map(
    shares: NDArray[Any],
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str = "",
    row_axis: str = "",
    column_axis: str = "",
    cell: int = 72,
) -> Pixels:
    """Draw a heat map with text in each cell.

    Args:
        shares: Color value of each cell, from 0 (white) to 1 (blue), of shape (n, m).
        texts: Text in each cell, nested sequence of shape (n, m).
        rows: Names of the n rows.
        columns: Names of the m columns.
        title: Title above the plot.
        row_axis: Axis label to the left of the row names.
        column_axis: Axis label above the column names.
        cell: Width and height of a cell in pixels.
    """
    font = ImageFont.load_default()
    rows, columns = ([escape_line(name) for name in names] for names in (rows, columns))  # Pillow measures one line
    axis_width = 2 * MARGIN if row_axis else 0
    left = axis_width + MARGIN + round(max(font.getlength(name) for name in rows)) + 6
    top = (2 * MARGIN if title else 0) + (2 * MARGIN if column_axis else 0) + 3 * MARGIN
    width = left + MARGIN + max(cell * len(columns), round(font.getlength(title)), round(font.getlength(column_axis)))
    image = Image.new("RGB", (width, top + max(cell * len(rows), round(font.getlength(row_axis))) + MARGIN), WHITE)
    pen = ImageDraw.Draw(image)
    if title:
        pen.text((left, MARGIN / 2), title, BLACK, font)
    if column_axis:
        pen.text((left + cell * len(columns) / 2, top - 2 * MARGIN), column_axis, BLACK, font, anchor="mb")
    if row_axis:
        axis = Image.new("RGB", (round(font.getlength(row_axis)), 2 * MARGIN), WHITE)
        ImageDraw.Draw(axis).text((0, MARGIN), row_axis, BLACK, font, anchor="lm")
        image.paste(axis.rotate(90, expand=True), (0, max(top, top + (cell * len(rows) - axis.width) // 2)))
    for column, name in enumerate(columns):
        pen.text((left + cell * (column + 0.5), top - 6), truncate(name, font, cell), BLACK, font, anchor="mb")
    for row, name in enumerate(rows):
        pen.text((left - 6, top + cell * (row + 0.5)), name, BLACK, font, anchor="rm")
        for column in range(len(columns)):
            share = float(shares[row, column])
            corner = left + cell * column, top + cell * row
            pen.rectangle((*corner, corner[0] + cell - 1, corner[1] + cell - 1), blend(share), GREY)
            middle = corner[0] + cell / 2, corner[1] + cell / 2
            pen.text(middle, texts[row][column], WHITE if share > 0.5 else BLACK, font, anchor="mm")
    return np.asarray(image)


def attention_maps(maps: NDArray[Any], tokens: Sequence[str], titles: Sequence[str], cell: int = 11) -> Pixels:
    """Draw the attention maps of several heads side by side with a color bar; rows are queries, columns are keys.

    Args:
        maps: Attention weights, of shape (heads, T, T).
        tokens: The T tokens as text.
        titles: Title of each map.
        cell: Width and height of a cell (one weight) in pixels.
    """
    font = ImageFont.load_default()
    label = MARGIN + round(max(font.getlength(token) for token in tokens))  # width of the row labels
    side = cell * len(tokens)
    width, top = side + MARGIN, label + 3 * MARGIN
    bar_left = label + len(titles) * width
    bar_width = 2 * MARGIN + round(font.getlength("attention weight"))
    image = Image.new("RGB", (bar_left + bar_width, top + side + MARGIN), WHITE)
    pen = ImageDraw.Draw(image)
    pen.text((0, MARGIN / 2), "row: query, column: key", BLACK, font)
    upright = Image.new("RGB", (label, side), WHITE)  # column labels, rotated below
    for place, token in enumerate(tokens):
        pen.text((label - 6, top + cell * (place + 0.5)), token, BLACK, font, anchor="rm")
        ImageDraw.Draw(upright).text((0, cell * (place + 0.5)), token, BLACK, font, anchor="lm")
    upright = upright.rotate(90, expand=True)
    for number, title in enumerate(titles):
        left = label + number * width
        pen.text((left, 1.5 * MARGIN), title, BLACK, font)
        image.paste(upright, (left, top - label - 2))
        image.paste(_color_square(maps[number], side), (left, top))
        pen.rectangle((left, top, left + side - 1, top + side - 1), outline=GREY)
    pen.text((bar_left, top - 6), "attention weight", BLACK, font, anchor="lb")
    bar = _color_square(np.linspace(1, 0, side)[:, None] ** (1 / GAMMA), side).resize((MARGIN, side))
    image.paste(bar, (bar_left, top))
    pen.rectangle((bar_left, top, bar_left + MARGIN - 1, top + side - 1), outline=GREY)
    for tick in COLOR_BAR_TICKS:
        y = top + (side - 1) * (1 - tick**GAMMA)
        pen.text((bar_left + MARGIN + 4, y), f"{tick:g}", BLACK, font, anchor="lm")
    return np.asarray(image)


def _color_square(weights: NDArray[Any], side: int) -> Image.Image:
    """Draw (n, m) weights between 0 and 1 as a square image of ``side`` pixels; NaN is gray."""
    share = weights[..., None].clip(0, 1) ** GAMMA  # (n, m, 1)
    colors = np.where(np.isnan(share), GREY, WHITE + (np.array(BLUE) - WHITE) * share)
    return Image.fromarray(colors.round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)


def line_plot(values: NDArray[Any], title: str, x_axis: str, width: int = 640, height: int = 320) -> Pixels:
    """Draw a line plot of values against their indices, with gaps at non-finite values.

    Args:
        values: Values to plot, of shape (n,).
        title: Title above the plot.
        x_axis: Label of the x axis.
        width: Width in pixels.
        height: Height in pixels.
    """
    font = ImageFont.load_default()
    image = Image.new("RGB", (width, height), WHITE)
    pen = ImageDraw.Draw(image)
    left, right, top, bottom = 48, width - MARGIN, 2 * MARGIN, height - 3 * MARGIN
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    span = high - low or 1.0
    for tick in np.linspace(low, low + span, 5):
        y = bottom - (tick - low) / span * (bottom - top)
        pen.line((left, y, right, y), GREY)
        pen.text((left - 6, y), f"{tick:.2f}", BLACK, font, anchor="rm")
    last = max(len(values) - 1, 1)
    for place in sorted({round(share * last) for share in (0, 0.25, 0.5, 0.75, 1)}):
        pen.text((left + place / last * (right - left), bottom + 6), str(place), BLACK, font, anchor="mt")
    pen.text((left, MARGIN / 2), title, BLACK, font)
    pen.text(((left + right) / 2, height - MARGIN), x_axis, BLACK, font, anchor="mm")
    points = [
        (left + place / last * (right - left), bottom - (value - low) / span * (bottom - top))
        for place, value in enumerate(values.tolist())
    ]
    for one, other in pairwise(points):
        if np.isfinite((*one, *other)).all():
            pen.line((*one, *other), BLUE, 2)
    return np.asarray(image)


def truncate(text: str, font: Any, width: int) -> str:
    """Truncate text to fit into ``width`` pixels."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
