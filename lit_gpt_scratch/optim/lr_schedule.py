"""The learning rate over the steps of a run, as a factor of its peak."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_gpt_scratch.errors import UserError

Decay = Literal["wsd", "linear", "cosine", "constant", "inverse_sqrt"]

COOLDOWN = 0.4
"""Share of the run in which ``wsd`` decays, unless another is given."""


@dataclass(frozen=True)
class Schedule:
    """Warm up, hold, decay.

    Args:
        decay: How the rate falls after warm-up. ``wsd``: it holds, and then falls linearly to ``final`` (warm-up,
            stable, decay: https://arxiv.org/abs/2404.06395); ``linear`` and ``cosine``
            (https://arxiv.org/abs/1608.03983): it falls to ``final`` all along; ``inverse_sqrt``: with the square
            root of the steps, which need have no end (https://arxiv.org/abs/1706.03762, section 5.3);
            ``constant``: not at all.
        warmup_steps: Optimizer steps over which the rate rises linearly to its peak.
        decay_share: Share of the run, at its end, in which ``wsd``, ``linear`` or ``cosine`` falls; by default 0.4
            for ``wsd``, and for the others 1, which is all from the end of warm-up on.
        final: Factor at the last step, of the three that end.

    Raises:
        UserError: A number is out of its range.
    """

    decay: Decay = "wsd"
    warmup_steps: int = 20
    decay_share: float | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.decay not in get_args(Decay):
            raise UserError(f"model.schedule.decay is {self.decay}; it must be one of {', '.join(get_args(Decay))}")
        if self.warmup_steps < 0:
            raise UserError(f"model.schedule.warmup_steps is {self.warmup_steps}; it must be 0 or more")
        for name, share in (("decay_share", self.decay_share), ("final", self.final)):
            if share is not None and not 0.0 <= share <= 1.0:
                raise UserError(f"model.schedule.{name} is {share}; it must lie between 0 and 1")

    @classmethod
    def default_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Values of arguments that are ``None``, given the others; ``fit`` saves them in ``config.yaml``."""
        shares = {"wsd": COOLDOWN, "linear": 1.0, "cosine": 1.0}
        return {"decay_share": shares[arguments["decay"]]} if arguments.get("decay") in shares else {}

    def factor(self, step: int, total_steps: float) -> float:
        """What the peak is multiplied by at a step.

        Args:
            step: Optimizer steps done so far, from 0.
            total_steps: Length of the run; infinite when nothing ends it but time, and then nothing falls to an end.
        """
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay == "inverse_sqrt":
            return min(warm, math.sqrt((self.warmup_steps + 1) / (step + 1)))
        if self.decay == "constant" or math.isinf(total_steps):
            return warm
        share = self.decay_share
        if share is None:
            share = self.default_arguments({"decay": self.decay})["decay_share"]
        length = max(1.0, min(share * total_steps, total_steps - self.warmup_steps))
        left = min(1.0, max(0.0, (total_steps - step) / length))  # 1 before the decay, 0 after the last step
        shape = 0.5 - 0.5 * math.cos(math.pi * left) if self.decay == "cosine" else left
        return warm * (self.final + (1 - self.final) * shape)
