"""Preferences that can be checked without a person, so that what alignment really achieves can be measured.

Each says whether a reply is as it is preferred to be, and makes of any reply another that differs in that. Nothing that
says nothing is preferred: neither an empty reply nor dots alone.
"""

import ast
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text import synthetic_data
from lit_gpt_scratch.text.chat_template import ASSISTANT, parse_conversation
from lit_gpt_scratch.text.document import TableRow

SHORT: Final = 8
"""Characters of a reply that is short."""
DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def has_content(reply: str) -> bool:
    """Whether there is a letter or a digit."""
    return any(character.isalnum() for character in reply)


def shorter(reply: str) -> bool:
    """Whether it has at most ``SHORT`` characters, space around it not counted."""
    return has_content(reply) and len(reply.strip()) <= SHORT


def full_stop(reply: str) -> bool:
    """Whether it ends with a full stop, and no more than one."""
    text = reply.rstrip()
    return has_content(reply) and text.endswith(".") and not text.endswith("..")


def no_digit(reply: str) -> bool:
    """Whether there is no digit in it."""
    return has_content(reply) and not any(character.isdigit() for character in reply)


def python_expression(reply: str) -> bool:
    """Whether Python reads it as an expression."""
    if not has_content(reply):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of expressions that are valid, and hardly meant
            ast.parse(reply.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # all of them are how the parser refuses
        return False
    return True


@dataclass(frozen=True)
class VerifiablePreference:
    """A preference.

    Attributes:
        holds: Whether a reply is as preferred.
        mend: Of a reply that says something, and is not so, one that is.
        spoil: Of a reply that is so, one that is not.
    """

    holds: Callable[[str], bool]
    mend: Callable[[str], str]
    spoil: Callable[[str], str]

    def pair(self, reply: str) -> tuple[str, str]:
        """A reply that says something as one of two, and the other one much like it; the preferred one first."""
        return (reply, self.spoil(reply)) if self.holds(reply) else (self.mend(reply), reply)


def _bare(reply: str) -> str:
    """Without full stops and space at its end."""
    return re.sub(r"[\s.]+$", "", reply)


def _spelled_out(reply: str) -> str:
    """With a word for each digit."""
    return "".join(DIGITS[unicodedata.digit(each)] if each.isdigit() else each for each in reply)


def _cut(reply: str) -> str:
    """The end of what it says."""
    whole = reply.strip()
    while not has_content(whole[-SHORT:]):
        whole = whole[:-1]
    return whole[-SHORT:].strip()


VERIFIABLE_PREFERENCES: Final[dict[str, VerifiablePreference]] = {
    "full_stop": VerifiablePreference(full_stop, lambda reply: f"{_bare(reply)}.", _bare),
    "shorter": VerifiablePreference(shorter, _cut, lambda reply: f"I would say: {reply}"),
    "no_digit": VerifiablePreference(no_digit, _spelled_out, lambda reply: f"1. {reply}"),
    "python_expression": VerifiablePreference(python_expression, repr, lambda reply: f"The answer is: {reply}"),
}
"""By name."""


def get_verifiable_preference(name: str) -> VerifiablePreference:
    """The preference of that name.

    Raises:
        UserError: There is none.
    """
    if name not in VERIFIABLE_PREFERENCES:
        raise UserError(f"there is no checkable preference {name}; there are {', '.join(VERIFIABLE_PREFERENCES)}")
    return VERIFIABLE_PREFERENCES[name]


def prompts() -> Iterator[TableRow]:
    """The generated conversations up to their last reply: rows with a ``prompt`` of messages."""
    return (TableRow(row.id, row.where, {"prompt": prompt}) for row, prompt, _ in _turns())


def preferences(name: str) -> Iterator[TableRow]:
    """The same with two replies: rows with ``prompt``, ``chosen`` and ``rejected``.

    Args:
        name: Of the checkable preference that decides between them.

    Raises:
        UserError: There is none.
    """
    prefer = get_verifiable_preference(name)
    for row, prompt, reply in _turns():
        chosen, rejected = prefer.pair(reply)
        yield TableRow(row.id, row.where, {"prompt": prompt, "chosen": chosen, "rejected": rejected})


def _turns() -> Iterator[tuple[TableRow, list[dict[str, Any]], str]]:
    for row in synthetic_data.conversations():
        *before, reply = parse_conversation(row.fields)
        assert reply.role == ASSISTANT
        yield row, [{"role": message.role, "content": message.content} for message in before], reply.content
