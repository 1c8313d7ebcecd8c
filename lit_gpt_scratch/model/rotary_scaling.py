"""Rotary frequencies for contexts longer than those a model was trained in.

``factor`` is how many times longer. Frequencies are in radians a token.
"""

import math
import operator
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig

SCALINGS: Final = ("linear", "ntk", "llama3", "yarn")
SLOW: Final = 1.0
FAST: Final = {"llama3": 4.0, "yarn": 32.0}
"""Turns within the trained context above which a pair of channels is left alone, where the config names none."""


def check_scaling(config: "GPTConfig") -> None:
    """Refuse settings that contradict each other.

    Raises:
        UserError: Both are named.
    """
    kind, trained = config.rotary_scaling, config.rotary_trained_context
    if config.rotary_base <= 1:
        raise UserError(f"model.gpt.rotary_base is {config.rotary_base}; it must be above 1")
    if kind is None and config.rotary_factor != 1:
        raise UserError(
            f"model.gpt.rotary_factor is {config.rotary_factor}, but model.gpt.rotary_scaling is not set; "
            f"choose one of {', '.join(SCALINGS)}"
        )
    if (kind in FAST) != (trained is not None):
        raise UserError(
            f"model.gpt.rotary_scaling is {kind}, but model.gpt.rotary_trained_context is {trained}; "
            f"{' and '.join(FAST)} need it, and nothing else does"
        )
    if kind not in FAST and (turns := config.rotary_slow or config.rotary_fast):
        name = "slow" if config.rotary_slow else "fast"
        raise UserError(
            f"model.gpt.rotary_{name} is {turns}, but model.gpt.rotary_scaling is {kind}; it needs {' or '.join(FAST)}"
        )
    if kind in FAST and not operator.lt(*_turns(config)):
        slow, fast = _turns(config)
        raise UserError(f"model.gpt.rotary_slow is {slow}, but model.gpt.rotary_fast is {fast}; it must be below it")
    if kind == "ntk" and config.rotary_width < 4:
        raise UserError(
            f"model.gpt.rotary_scaling is ntk, but of a head {config.rotary_width} channels are turned; 4 do"
        )


def _turns(config: "GPTConfig") -> tuple[float, float]:
    """Below how many turns within the trained context a pair is slowed in full, and above how many not at all."""
    return config.rotary_slow or SLOW, config.rotary_fast or FAST[str(config.rotary_scaling)]


def frequencies(config: "GPTConfig", width: int) -> tuple[Tensor, float]:
    """The angle by which each pair of channels turns from one token to the next.

    - ``linear``: all slower by the factor (https://arxiv.org/abs/2306.15595).
    - ``ntk``: another base, so that the slowest pair is slower by the factor and the fastest as it was
      (NTK-aware, https://arxiv.org/abs/2309.00071, section 3.1).
    - ``llama3``: pairs that turn less than ``rotary_slow`` times within the trained context are slowed by the factor,
      those above ``rotary_fast`` are left alone, and in between the share grows with the turns (Llama 3.1).
    - ``yarn``: the same, but the share grows with the pair's number, and attention is sharpened
      (https://arxiv.org/abs/2309.00071, section 3.2 and 3.4).

    Args:
        config: The architecture.
        width: Channels of a head that are turned.

    Returns:
        (width / 2,) float32, and what cosines and sines are multiplied by.
    """
    half = torch.arange(0, width, 2, dtype=torch.float32)  # (width / 2,)
    plain = 1.0 / config.rotary_base ** (half / width)  # written as it was published: another way rounds otherwise
    kind, factor = config.rotary_scaling, config.rotary_factor
    if kind is None:
        return plain, 1.0
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "ntk":
        return 1.0 / (config.rotary_base * factor ** (width / (width - 2))) ** (half / width), 1.0
    assert config.rotary_trained_context is not None
    slow, fast = _turns(config)
    if kind == "llama3":
        turns = config.rotary_trained_context * plain / (2 * math.pi)
        kept = ((turns - slow) / (fast - slow)).clamp(0, 1)  # (width / 2,), share of the frequency as it was
        return plain * kept + plain / factor * (1 - kept), 1.0

    def pair(turns: float) -> float:
        """The number of the pair that turns so many times within the trained context."""
        wavelength = (config.rotary_trained_context or 0) / turns / (2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(config.rotary_base))

    first, last = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), width - 1)
    slowed = ((half / 2 - first) / max(last - first, 0.001)).clamp(0, 1)  # (width / 2,)
    sharper = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return plain * (1 - slowed) + plain / factor * slowed, sharper
