"""A document of a few kinds of parts, as one HTML file and as Markdown."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #888; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; } figure { margin: 1rem 0; } svg { max-width: 100%; }
figcaption { color: #666; }
"""


@dataclass(frozen=True)
class Heading:
    """Begins a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """A command, or several lines of them."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A drawing: its SVG, and the name of its file where it cannot be within."""

    name: str
    svg: str
    caption: str


Part = Heading | Text | Code | Table | Figure


def markdown(title: str, parts: Sequence[Part]) -> str:
    """The document as Markdown; its figures are files beside it."""
    return "\n\n".join([f"# {title}", *map(_markdown, parts)]) + "\n"


def page(title: str, parts: Sequence[Part]) -> str:
    """The document as one HTML file that needs no other, and runs nothing."""
    name, body = html.escape(title), "\n".join(map(_html, parts))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n'
        f"<body><h1>{name}</h1>\n{body}\n</body></html>\n"
    )


def _markdown(part: Part) -> str:
    match part:
        case Heading(text):
            return f"## {text}"
        case Code(text):
            return f"```bash\n{text}\n```"
        case Figure(name, _, caption):
            return f"![{caption}]({name}.svg)"
        case Table(head, rows):
            lines = [head, ["---"] * len(head), *rows]
            return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
        case Text(text):
            return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _html(part: Part) -> str:
    match part:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Figure(_, svg, caption):
            drawing = svg[svg.index("<svg") :]  # without what belongs to a file of its own
            return f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>"
        case Table(head, rows):
            heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            kinds = [" class=n" if _numbers(column) else "" for column in zip(*rows, strict=True)]
            lines = ["".join(f"<td{k}>{html.escape(c)}</td>" for k, c in zip(kinds, row, strict=True)) for row in rows]
            body = "\n".join(f"<tr>{line}</tr>" for line in lines)
            return f"<table><tr>{heads}</tr>\n{body}</table>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"


def _numbers(column: Sequence[str]) -> bool:
    """Whether a column holds nothing else, and so is read best with its digits below each other."""
    return all(re.fullmatch(r"(< ?)?[-+]?[\d.,]+(e[-+]?\d+)?( ± [\d.]+)?|", cell) for cell in column)
