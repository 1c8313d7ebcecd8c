"""Reward functions for text: verifiable rewards, which require no human labels, and user-defined functions.

A verifiable reward is a rule that a program can check, such as "the reply ends with a full stop"; a reply is an
assistant message. The effect of alignment can therefore be measured exactly. A verifiable reward also provides
functions that convert a reply that violates the rule to one that satisfies it, and vice versa. A reply without a letter
or digit never satisfies a rule.
"""

import ast
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.trust import import_object

MAX_SHORT_CHARACTERS: Final = 8
"""Maximum number of characters in a short reply."""
DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def has_content(reply: str) -> bool:
    """Return whether a reply contains a letter or digit."""
    return any(character.isalnum() for character in reply)


def shorter(reply: str) -> bool:
    """Return whether a reply has at most ``MAX_SHORT_CHARACTERS`` characters after stripping whitespace."""
    return has_content(reply) and len(reply.strip()) <= MAX_SHORT_CHARACTERS


def full_stop(reply: str) -> bool:
    """Return whether a reply ends with exactly one full stop."""
    text = reply.rstrip()
    return has_content(reply) and text.endswith(".") and not text.endswith("..")


def no_digit(reply: str) -> bool:
    """Return whether a reply contains letters but no digits."""
    return has_content(reply) and not any(character.isdigit() for character in reply)


def python_expression(reply: str) -> bool:
    """Return whether a reply parses as a Python expression."""
    if not has_content(reply):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # suppresses SyntaxWarnings about valid but odd expressions
            ast.parse(reply.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the parser raises any of these for invalid code
        return False
    return True


@dataclass(frozen=True)
class VerifiableReward:
    """Reward defined by a rule that preferred replies satisfy and rejected replies violate.

    Attributes:
        satisfied: Function that returns whether a reply satisfies the rule.
        make_preferred: Function that converts a reply that violates the rule to one that satisfies it; the reply must
            contain a letter or digit.
        make_rejected: Function that converts a reply that satisfies the rule to one that violates it.
    """

    satisfied: Callable[[str], bool]
    make_preferred: Callable[[str], str]
    make_rejected: Callable[[str], str]

    def make_pair(self, reply: str) -> tuple[str, str]:
        """Return a preferred and a rejected reply: ``reply`` and a modified copy of it.

        The reply must contain a letter or digit.
        """
        if self.satisfied(reply):
            return reply, self.make_rejected(reply)
        return self.make_preferred(reply), reply


def _strip_full_stops(reply: str) -> str:
    return re.sub(r"[\s.]+$", "", reply)


def _spell_out_digits(reply: str) -> str:
    return "".join(DIGITS[unicodedata.digit(each)] if each.isdigit() else each for each in reply)


def _last_characters(reply: str) -> str:
    """Return the last ``MAX_SHORT_CHARACTERS`` characters of a reply, without leading and trailing whitespace.

    If they do not include a letter or digit, characters are first removed from the end of the reply until they do.
    """
    text = reply.strip()
    while not has_content(text[-MAX_SHORT_CHARACTERS:]):
        text = text[:-1]
    return text[-MAX_SHORT_CHARACTERS:].strip()


VERIFIABLE_REWARDS: Final[dict[str, VerifiableReward]] = {
    "full_stop": VerifiableReward(full_stop, lambda reply: f"{_strip_full_stops(reply)}.", _strip_full_stops),
    "shorter": VerifiableReward(shorter, _last_characters, lambda reply: f"I would say: {reply}"),
    "no_digit": VerifiableReward(no_digit, _spell_out_digits, lambda reply: f"1. {reply}"),
    "python_expression": VerifiableReward(python_expression, repr, lambda reply: f"The answer is: {reply}"),
}
"""Verifiable rewards, keyed by name."""


def get_verifiable_reward(name: str) -> VerifiableReward:
    """Return the verifiable reward with the given name.

    Raises:
        UserError: No verifiable reward has this name.
    """
    if name not in VERIFIABLE_REWARDS:
        raise UserError(f"verifiable reward {name} not found; choose from {', '.join(VERIFIABLE_REWARDS)}")
    return VERIFIABLE_REWARDS[name]


class TextReward(NamedTuple):
    """A reward function for text.

    Attributes:
        name: Name of the reward as specified by the user.
        function: Function that takes a list of prompts and a list with one reply per prompt, and returns the reward for
            each reply as a list, an array or a tensor.
        unended: Reward for a truncated reply, which has no end-of-text token; if None, ``function`` computes the
            reward.
    """

    name: str
    function: Callable[[Sequence[str], Sequence[str]], Any]
    unended: float | None = None


def load_text_reward(name: str) -> TextReward:
    """Load a reward function by name.

    Args:
        name: Name of a verifiable reward, which is 1 for a complete reply that satisfies its rule and 0 otherwise;
            or the import path of a user-defined function, such as ``my_file.my_function``.

    Raises:
        UserError: The function does not exist or is not callable.
    """
    if name in VERIFIABLE_REWARDS:
        satisfied = VERIFIABLE_REWARDS[name].satisfied
        return TextReward(name, lambda prompts, replies: [float(satisfied(reply)) for reply in replies], 0.0)
    choices = f"set it to a run, a function such as my_file.my_reward, or one of {', '.join(VERIFIABLE_REWARDS)}"
    if "." not in name:
        raise UserError(f"model.reward is {name}, which does not exist; {choices}")
    try:
        function = import_object(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"model.reward is {name}, which cannot be imported: {error}; {choices}") from error
    if not callable(function):
        raise UserError(
            f"model.reward is {name}, which is of type {type(function).__name__}, not a function; {choices}"
        )
    return TextReward(name, function)
