"""Markdown tables that are also readable in a terminal."""

from collections.abc import Sequence

from lit_gpt_scratch.text.escaping import escape_markdown


def format_markdown_table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Format rows as an aligned Markdown table; the first row is the header.

    Args:
        rows: Cells of each row: text, which is escaped, or ``Markdown``.
        alignment: One character per column: ``<`` for left alignment or ``>`` for right alignment.
    """
    rows = [[escape_markdown(cell) for cell in row] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, alignment, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = ["-" * width if a == "<" else "-" * (width - 1) + ":" for a, width in zip(alignment, widths, strict=True)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def format_compact_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows like ``format_markdown_table``, but without alignment, so that each line depends only on its row."""
    lines = [f"| {' | '.join(map(escape_markdown, row))} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])
