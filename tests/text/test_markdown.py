"""Hostile text is displayed, not interpreted: checked with independent parsers of Markdown and JSON."""

import json
import re
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.plugin_util import markdown_to_safe_html

from lit_gpt_scratch.terminal_output import dump_json, escape_line, escape_terminal
from lit_gpt_scratch.text.markdown import (
    Markdown,
    escape_markdown,
    format_compact_table,
    format_markdown_table,
    markdown_code,
    markdown_code_block,
)
from tests.hostile import HOSTILE

TABLE = {"table", "thead", "tbody", "tr", "th", "td"}
PIECES = st.lists(
    st.sampled_from([*HOSTILE.values(), *"\\`*_[]()<>&#!|~-+.={}:$@ \t\nab01é", "    ", "```", "---", "1. ", "<!--",
                     "-->", "<?", "<![CDATA[", "]]>", "&lt;", "</", "\x02", "\x03", "klzzwxh:0001"]),
    max_size=8,
).map("".join)  # fmt: skip


class _Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def as_common_mark(text: str) -> str:
    """Render as GitHub and editors do."""
    markdown_it = pytest.importorskip("markdown_it")
    return str(markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(text))


def words(text: str) -> str:
    return " ".join(text.split())


def is_control(character: str) -> bool:
    """The claim in terms of Unicode's own categories and directions."""
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return (
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in directions
        or character in "\u200e\u200f\u061c"
    )


def test_exactly_control_characters_are_escaped() -> None:
    deprecated = {chr(number) for number in range(0x206A, 0x2070)}
    everything = list(map(chr, range(0x110000)))
    controls = {character for character in everything if is_control(character)} | deprecated
    others = "".join(character for character in everything if character not in controls)
    assert escape_line(others) == escape_terminal(others) == others
    for character in controls:
        assert not controls & {*escape_line(character)}, hex(ord(character))
        assert (escape_terminal(character) == character) == (character in "\n\t"), hex(ord(character))


def test_escapes_are_those_of_python() -> None:
    assert escape_line("a\x1b[2J\r\u202e\udc80\n") == "a\\x1b[2J\\r\\u202e\\udc80\\n"
    assert escape_terminal("a\r\nb\tc\r") == "a\r\nb\tc\\r"


@pytest.mark.parametrize("render", [markdown_to_safe_html, as_common_mark], ids=["tensorboard", "CommonMark"])
def test_markdown_displays_any_text(render: Callable[[str], str]) -> None:
    """There is no link, no image and no foreign tag, and the text is found as it was."""

    def check(text: str, made: str, tags: set[str]) -> None:
        page = _Page(render(made))
        assert page.tags <= tags, made
        assert words(text) in words(page.text), made

    @settings(max_examples=100)
    @given(PIECES)
    def check_all(text: str) -> None:
        line, escaped, code = escape_line(text), escape_markdown(text), markdown_code(text)
        assert "\n" not in escaped + code
        check(line, escaped, {"p"})
        check(line, f"before {escaped}, after", {"p"})
        check(line, f"## {escaped} (3)", {"h2"})
        check(line, f"- {code}: {markdown_code('b')}", {"ul", "li", "code"})
        for table in (format_markdown_table, lambda rows, _: format_compact_table(rows)):
            check(line, table([["a", text], [text, code]], "<>"), {*TABLE, "code"})
        check(escape_terminal(text), f"before\n\n{markdown_code_block(text)}\n\nafter", {"p", "pre", "code"})

    for text in HOSTILE.values():
        check(escape_line(text), escape_markdown(text), {"p"})
    check_all()


def test_ordinary_text_stays_readable_as_markdown() -> None:
    for text in ("model.gpt.n_layer 2", "-1.5 ± 0.1", "p < 0.0001", "1 & 2", "src/a_file.py:3", "a (b), c; d = 1.0!"):
        assert escape_markdown(text) == text
    assert markdown_code("a_b*c") == "`a_b*c`"
    assert markdown_code("a`b") == "``a`b``"
    assert escape_markdown(Markdown("**a**")) == "**a**"


@settings(max_examples=50)
@given(st.dictionaries(st.text() | PIECES, st.text() | PIECES, max_size=3))
def test_json_keeps_its_value(value: dict[str, str]) -> None:
    line = dump_json(value)
    assert not any(map(is_control, line))
    assert json.loads(line) == value
    assert "é" in dump_json({"é": 1})
    assert re.fullmatch(r"[^\n]*", line)
