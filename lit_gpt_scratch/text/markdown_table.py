"""Markdown tables that are also readable in a terminal."""

from collections.abc import Sequence


def format_markdown_table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Format rows as an aligned Markdown table; the first row is the header.

    Args:
        rows: Cells of each row.
        alignment: One character per column: ``<`` for left alignment or ``>`` for right alignment.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, alignment, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = ["-" * width if a == "<" else "-" * (width - 1) + ":" for a, width in zip(alignment, widths, strict=True)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])
