"""Format text, code and tables as Markdown.

Text from documents, files, models and users may contain Markdown or HTML, which must be displayed, not interpreted. In
HTML reports, ``jinja2`` escapes it.
"""

import re
from collections.abc import Sequence
from typing import Final

from lit_gpt_scratch.terminal_output import escape_line, escape_terminal

# Only characters that would be interpreted are escaped, so that the text stays readable. Python-Markdown, which
# TensorBoard uses, supports backslashes before fewer characters than CommonMark, so the others become entities.
_ENTITIES: Final = re.compile(r"&(?=[#\w])|<(?=\S|$)|~|:(?=//)|(?<=www)\.", re.IGNORECASE)
_SPECIAL: Final = re.compile(r"[\\`*\[\]|]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word has no effect
_BLOCK_MARKER: Final = re.compile(r"^(?:\d+(?=[.)](?:\s|$))|(?=[#>]|[-+](?:\s|$|-)))")


class Markdown(str):
    """String that is already Markdown, so that ``escape_markdown`` does not change it."""

    __slots__ = ()


def escape_markdown(text: str) -> Markdown:
    """Escape text for display in a Markdown paragraph, heading, list or table; return ``Markdown`` unchanged."""
    if isinstance(text, Markdown):
        return text
    text = _ENTITIES.sub(lambda found: f"&#{ord(found[0])};", escape_line(text).strip())
    text = _SPECIAL.sub(lambda found: "\\" + found[0], text)
    return Markdown(_BLOCK_MARKER.sub(lambda found: found[0] + "\\", text))


def markdown_code(text: str) -> Markdown:
    """Format text as inline code, or as escaped text if it contains ``|``.

    Markdown parsers differ in whether a ``|`` in inline code ends a table cell.
    """
    text = escape_line(text).strip()
    if "|" in text or not text:
        return escape_markdown(text)
    fence = "`" * (_longest_run_of_backticks(text) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return Markdown(f"{fence}{padding}{text}{padding}{fence}")


def markdown_code_block(text: str, language: str = "") -> Markdown:
    """Format text as a Markdown code block, optionally with syntax highlighting for a language."""
    fence = "`" * max(3, _longest_run_of_backticks(text) + 1)
    return Markdown(f"{fence}{language}\n{escape_terminal(text)}\n{fence}")


def format_markdown_table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Format rows as an aligned Markdown table; the first row is the header.

    Args:
        rows: Cells of each row; strings are escaped unless they are ``Markdown``.
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


def _longest_run_of_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
