"""Reward functions of text: verifiable preferences, which need no human judgement, and the user's own functions.

A verifiable preference decides whether a reply satisfies a rule, and turns any reply into a similar one that differs in
that rule, so that the effect of alignment can be measured exactly. A reply without content, empty or only dots, never
satisfies a preference.
"""

import ast
import importlib
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from lit_gpt_scratch.errors import UserError

MAX_SHORT_CHARACTERS: Final = 8
"""Maximum characters of a short reply."""
DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def has_content(reply: str) -> bool:
    """Whether a reply has a letter or a digit."""
    return any(character.isalnum() for character in reply)


def shorter(reply: str) -> bool:
    """Whether a reply has at most ``MAX_SHORT_CHARACTERS`` characters, not counting whitespace around it."""
    return has_content(reply) and len(reply.strip()) <= MAX_SHORT_CHARACTERS


def full_stop(reply: str) -> bool:
    """Whether a reply ends with exactly one full stop."""
    text = reply.rstrip()
    return has_content(reply) and text.endswith(".") and not text.endswith("..")


def no_digit(reply: str) -> bool:
    """Whether a reply has no digits."""
    return has_content(reply) and not any(character.isdigit() for character in reply)


def python_expression(reply: str) -> bool:
    """Whether a reply parses as a Python expression."""
    if not has_content(reply):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SyntaxWarnings about valid but odd expressions
            ast.parse(reply.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # all of these are how the parser rejects text
        return False
    return True


@dataclass(frozen=True)
class VerifiablePreference:
    """A rule that preferred replies satisfy.

    Attributes:
        satisfied: Whether a reply satisfies the rule.
        make_preferred: Maps a reply that has content but does not satisfy the rule to one that does.
        make_rejected: Maps a reply that satisfies the rule to one that does not.
    """

    satisfied: Callable[[str], bool]
    make_preferred: Callable[[str], str]
    make_rejected: Callable[[str], str]

    def make_pair(self, reply: str) -> tuple[str, str]:
        """Return a preferred and a rejected reply: the given one, which has content, and a similar one."""
        if self.satisfied(reply):
            return reply, self.make_rejected(reply)
        return self.make_preferred(reply), reply


def _strip_full_stops(reply: str) -> str:
    return re.sub(r"[\s.]+$", "", reply)


def _spell_out_digits(reply: str) -> str:
    return "".join(DIGITS[unicodedata.digit(each)] if each.isdigit() else each for each in reply)


def _last_characters(reply: str) -> str:
    """The last characters of a reply that have content."""
    text = reply.strip()
    while not has_content(text[-MAX_SHORT_CHARACTERS:]):
        text = text[:-1]
    return text[-MAX_SHORT_CHARACTERS:].strip()


VERIFIABLE_PREFERENCES: Final[dict[str, VerifiablePreference]] = {
    "full_stop": VerifiablePreference(full_stop, lambda reply: f"{_strip_full_stops(reply)}.", _strip_full_stops),
    "shorter": VerifiablePreference(shorter, _last_characters, lambda reply: f"I would say: {reply}"),
    "no_digit": VerifiablePreference(no_digit, _spell_out_digits, lambda reply: f"1. {reply}"),
    "python_expression": VerifiablePreference(python_expression, repr, lambda reply: f"The answer is: {reply}"),
}
"""Verifiable preferences by name."""


def get_verifiable_preference(name: str) -> VerifiablePreference:
    """Return the preference of this name.

    Raises:
        UserError: There is none.
    """
    if name not in VERIFIABLE_PREFERENCES:
        raise UserError(f"no verifiable preference is called {name}; choose from {', '.join(VERIFIABLE_PREFERENCES)}")
    return VERIFIABLE_PREFERENCES[name]


class TextReward(NamedTuple):
    """A reward function of text.

    Attributes:
        name: As the user gave it.
        function: Maps prompts, and one reply to each, to one number each: a list, an array or a tensor.
        unended: The reward of a reply that was truncated before it ended; None to ask the function.
    """

    name: str
    function: Callable[[Sequence[str], Sequence[str]], Any]
    unended: float | None = None


def load_text_reward(name: str) -> TextReward:
    """Load a reward function by name.

    Args:
        name: A verifiable preference, whose reward is 1 for a complete reply that satisfies it and 0 otherwise; or
            ``my_file.my_function``.

    Raises:
        UserError: No such function, or it is not callable.
    """
    if name in VERIFIABLE_PREFERENCES:
        satisfied = VERIFIABLE_PREFERENCES[name].satisfied
        return TextReward(name, lambda prompts, replies: [float(satisfied(reply)) for reply in replies], 0.0)
    module, _, attribute = name.rpartition(".")
    choices = f"name a run, a function such as my_file.my_reward, or one of {', '.join(VERIFIABLE_PREFERENCES)}"
    if not module:
        raise UserError(f"model.reward is {name}, which does not exist; {choices}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"model.reward is {name}, which cannot be imported: {error}; {choices}") from error
    if not callable(function):
        raise UserError(f"model.reward is {name}, which is {type(function).__name__}, not a function; {choices}")
    return TextReward(name, function)
