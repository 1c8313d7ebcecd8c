"""Script that renders an untrusted chat template: ``python template_worker.py SECONDS BYTES``.

A chat template is untrusted code. It runs in the ``jinja2`` sandbox, where it can access only the variables that it is
given, and in this process, whose time and memory are limited per request. The script reads one JSON value per line:
first the template, then requests, each a list of contexts (objects with the template's variables). For each line, it
writes a JSON object with one of three keys: ``texts`` (the rendered text of each context), ``rejected`` (why the
template rejects the messages) or ``error`` (why rendering failed).
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_TEXT: Final = 2**24
"""Maximum total number of characters rendered per request."""
MAX_REASON: Final = 200
"""Maximum number of characters in an error message."""


class RejectedMessagesError(jinja2.TemplateError):
    """Raised when a template calls ``raise_exception``, by which it rejects the messages."""


class GenerationBlock(Extension):
    """Extension for ``{% generation %}`` blocks, which mark replies in some templates and do not change the text."""

    tags = {"generation"}  # noqa: RUF012 - declared by the base class

    def parse(self, parser: Parser) -> Node | list[Node]:
        """Return the nodes inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PublicNamespace(Namespace):
    """Namespace that rejects attributes with a leading underscore, as ``transformers`` does."""

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an attribute; raise an error if its name begins with an underscore."""
        if name.startswith("_"):
            raise jinja2.TemplateError(f"the attribute {name} of a namespace begins with an underscore")
        super().__setitem__(name, value)


def main() -> None:
    """Answer requests until the end of standard input; the script's arguments limit CPU time and address space."""
    sys.path[0] = str(Path(__file__).parents[2])  # not the folder of this file, whose modules may shadow others
    from lit_gpt_scratch.text.tokenizer_probe import limit_resources

    template: jinja2.Template | None = None
    for line in sys.stdin:
        limit_resources(*map(int, sys.argv[1:]))
        answer: dict[str, Any] = {"texts": []}
        try:
            if template is None:
                template = compile_template(json.loads(line))
            else:
                answer["texts"] = render(template, json.loads(line))
        except BaseException as error:  # a template can raise any exception
            reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
            answer = {"rejected" if isinstance(error, RejectedMessagesError) else "error": reason}
        print(json.dumps(answer), flush=True)


def compile_template(source: str) -> jinja2.Template:
    """Compile a template with the syntax and functions that ``transformers`` provides, except the current time."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "dict": _make_dict, "namespace": PublicNamespace}
    return environment.from_string(source)


def render(template: jinja2.Template, contexts: list[dict[str, Any]]) -> list[str]:
    """Render a template in each context.

    Raises:
        ValueError: The rendered texts are too long.
    """
    texts: list[str] = []
    length = 0
    for context in contexts:
        parts = []
        for part in template.generate(context):
            parts.append(part)
            length += len(part)
            if length > MAX_TEXT:
                raise ValueError(f"it renders more than {MAX_TEXT:,} characters")
        texts.append("".join(parts))
    return texts


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: object) -> None:
    raise RejectedMessagesError(str(message))


def _make_dict(*args: Any, **fields: Any) -> dict[Any, Any]:
    return dict(*args, **fields)


if __name__ == "__main__":
    main()
