"""What says how good a reply is: a preference that can be checked, or anybody's own function."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.verifiable_rewards import VERIFIABLE_PREFERENCES


class TextReward(NamedTuple):
    """A function of replies.

    Attributes:
        name: As it was given.
        function: Prompts, and a reply to each -> a number for each: a list, an array, or a tensor.
        unended: What a reply counts that does not come to its end; None for what the function says.
    """

    name: str
    function: Callable[[Sequence[str], Sequence[str]], Any]
    unended: float | None = None


def load_text_reward(name: str) -> TextReward:
    """The function of that name.

    Args:
        name: Of a checkable preference, which counts 1 where it holds of a reply that comes to its end, and else 0; or
            ``my_file.my_function``.

    Raises:
        UserError: There is none, or it cannot be called.
    """
    if name in VERIFIABLE_PREFERENCES:
        holds = VERIFIABLE_PREFERENCES[name].holds
        return TextReward(name, lambda prompts, replies: [float(holds(reply)) for reply in replies], 0.0)
    module, _, attribute = name.rpartition(".")
    known = f"name a run, a function such as my_file.my_reward, or one of {', '.join(VERIFIABLE_PREFERENCES)}"
    if not module:
        raise UserError(f"model.reward is {name}, and there is none; {known}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"model.reward is {name}, which cannot be imported: {error}; {known}") from error
    if not callable(found):
        raise UserError(f"model.reward is {name}, which is {type(found).__name__}, not a function; {known}")
    return TextReward(name, found)
