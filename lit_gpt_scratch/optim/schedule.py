"""The learning rate over the steps of a run, as a factor of its peak."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lit_gpt_scratch.errors import UserError

Decay = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class Schedule:
    """Warm up, hold, decay.

    Args:
        decay: ``linear`` or ``cosine`` (https://arxiv.org/abs/1608.03983) down to ``final``, or ``constant``.
        warmup_steps: Optimizer steps over which the rate rises linearly to its peak.
        decay_share: Share of the run, at its end, in which the rate falls. 1 decays from the end of warm-up
            on; less is warm-up, stable, decay (https://arxiv.org/abs/2404.06395).
        final: Factor at the last step.

    Raises:
        UserError: A number is out of its range.
    """

    decay: Decay = "linear"
    warmup_steps: int = 20
    decay_share: float = 0.4
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.decay not in get_args(Decay):
            raise UserError(f"model.schedule.decay is {self.decay}; it must be one of {', '.join(get_args(Decay))}")
        if self.warmup_steps < 0:
            raise UserError(f"model.schedule.warmup_steps is {self.warmup_steps}; it must be 0 or more")
        for name, share in (("decay_share", self.decay_share), ("final", self.final)):
            if not 0.0 <= share <= 1.0:
                raise UserError(f"model.schedule.{name} is {share}; it must lie between 0 and 1")

    def factor(self, step: int, total_steps: float) -> float:
        """What the peak is multiplied by at a step.

        Args:
            step: Optimizer steps done so far, from 0.
            total_steps: Length of the run; infinite when nothing ends it but time, and then nothing decays.
        """
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay == "constant" or math.isinf(total_steps):
            return warm
        length = max(1.0, min(self.decay_share * total_steps, total_steps - self.warmup_steps))
        left = min(1.0, max(0.0, (total_steps - step) / length))  # 1 before the decay, 0 after the last step
        shape = left if self.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)
        return warm * (self.final + (1 - self.final) * shape)
