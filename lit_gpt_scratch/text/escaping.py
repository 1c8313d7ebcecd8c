"""Escaping of text from documents, files, models and users: for terminals, for Markdown and for JSON.

Such text may contain terminal escape sequences, Markdown or HTML, which must be displayed, not interpreted. In HTML
reports, ``jinja2`` escapes it.
"""

import json
import re
from typing import Any, Final

CONTROLS: Final = "\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff"
"""Ranges of a regular expression: control characters except tab and newline, line separators, bidirectional controls,
which reorder the text around them (https://trojansource.codes), and surrogates, which have no encoding."""
_UNSAFE: Final = re.compile(f"(?!\r\n)[{CONTROLS}]")
_UNSAFE_IN_LINE: Final = re.compile(f"[\t\n{CONTROLS}]")
_UNSAFE_IN_JSON: Final = re.compile(f"[{CONTROLS}]")

# Only what would be interpreted is escaped, so that Markdown stays readable as plain text. Python-Markdown, which
# TensorBoard uses, supports backslashes before fewer characters than CommonMark, so the others become entities.
_ENTITIES: Final = re.compile(r"&(?=[#\w])|<(?=\S|$)|~|:(?=//)|(?<=www)\.", re.IGNORECASE)
_SPECIAL: Final = re.compile(r"[\\`*\[\]|]|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word has no effect
_BLOCK_MARKER: Final = re.compile(r"^(?:\d+(?=[.)](?:\s|$))|(?=[#>]|[-+](?:\s|$|-)))")


class Markdown(str):
    """Text that is Markdown already: ``escape_markdown`` does not change it."""

    __slots__ = ()


def escape_terminal(text: str) -> str:
    r"""Replace control characters with visible escapes such as ``\x1b``, except tabs and the ends of lines."""
    return _UNSAFE.sub(_visible, text)


def escape_line(text: str) -> str:
    r"""Replace control characters with visible escapes such as ``\x1b`` and ``\n``, so that the text is one line."""
    return _UNSAFE_IN_LINE.sub(_visible, text)


def quote_short(text: str, length: int = 200) -> str:
    """Return text from a file or a library for an error message: one line of at most ``length`` characters."""
    line = escape_line(" ".join(text[: 2 * length].split()))
    return line if len(text) <= length and len(line) <= length else f"{line[: length - 3]}..."


def escape_markdown(text: str) -> Markdown:
    """Return Markdown that displays the text, in a paragraph, a heading, a list or a table; ``Markdown`` is kept."""
    if isinstance(text, Markdown):
        return text
    text = _ENTITIES.sub(lambda found: f"&#{ord(found[0])};", escape_line(text).strip())
    text = _SPECIAL.sub(lambda found: "\\" + found[0], text)
    return Markdown(_BLOCK_MARKER.sub(lambda found: found[0] + "\\", text))


def markdown_code(text: str) -> Markdown:
    """Return Markdown that displays the text as inline code; without the code style if it contains ``|``.

    Whether a ``|`` in inline code ends a table cell differs between Markdown parsers.
    """
    text = escape_line(text).strip()
    if "|" in text or not text:
        return escape_markdown(text)
    fence = "`" * (_longest_run_of_backticks(text) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return Markdown(f"{fence}{padding}{text}{padding}{fence}")


def markdown_code_block(text: str, language: str = "") -> Markdown:
    """Return Markdown that displays the text as a code block, optionally highlighted as a programming language."""
    fence = "`" * max(3, _longest_run_of_backticks(text) + 1)
    return Markdown(f"{fence}{language}\n{escape_terminal(text)}\n{fence}")


def dump_json(value: Any) -> str:
    """Serialize a value as one line of readable JSON that is safe to print on a terminal."""
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def _visible(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


def _longest_run_of_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
