"""Learning-rate schedule with a warmup, a constant phase and a decay."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Literal, get_args

from lit_gpt_scratch.errors import UserError

Decay = Literal["wsd", "linear", "cosine", "constant", "inverse_sqrt", "multistep"]
Stages = tuple[tuple[float, float], ...]

DEFAULT_STAGES: Final[Stages] = ((0.8, 0.316), (0.9, 0.1))
"""Default value of ``stages`` for ``multistep``, as in DeepSeek LLM."""
DEFAULT_DECAY_SHARES: Final = {"wsd": 0.4, "linear": 1.0, "cosine": 1.0}
"""Default values of ``decay_share``, keyed by ``decay``."""


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule, expressed as a factor by which the peak learning rate is multiplied.

    Args:
        decay: Type of learning-rate decay after warmup: ``wsd`` (warmup-stable-decay, https://arxiv.org/abs/2404.06395)
            holds the peak and then decays linearly to ``final``; ``linear`` and ``cosine``
            (https://arxiv.org/abs/1608.03983) decay to ``final`` from the end of warmup; ``multistep`` drops to a lower
            constant at the start of each of the ``stages`` (DeepSeek LLM, https://arxiv.org/abs/2401.02954);
            ``inverse_sqrt`` decays with the inverse square root of the step and is suitable for runs of unknown length
            (https://arxiv.org/abs/1706.03762, section 5.3); ``constant`` does not decay.
        warmup_steps: Number of optimizer steps over which the learning rate rises linearly to its peak.
        decay_share: Fraction of the optimizer steps, at the end of the run, over which ``wsd``, ``linear`` or
            ``cosine`` decays the learning rate. The default is 0.4 for ``wsd``, and 1 for ``linear`` and ``cosine``,
            which then decay over all steps after warmup.
        final: Learning rate at the end of a ``wsd``, ``linear`` or ``cosine`` decay, as a fraction of the peak.
        stages: For ``multistep``, the start of each stage as a fraction of the run, and its learning rate as a fraction
            of the peak. The default is ((0.8, 0.316), (0.9, 0.1)).

    Raises:
        UserError: A value is out of range.
    """

    decay: Decay = "wsd"
    warmup_steps: int = 20
    decay_share: float | None = None
    final: float = 0.0
    stages: Stages | None = None

    def __post_init__(self) -> None:
        if self.decay not in get_args(Decay):
            raise UserError(f"model.schedule.decay is {self.decay}; it must be one of {', '.join(get_args(Decay))}")
        if self.warmup_steps < 0:
            raise UserError(f"model.schedule.warmup_steps is {self.warmup_steps}; it must be 0 or more")
        for name, share in (("decay_share", self.decay_share), ("final", self.final)):
            if share is not None and not 0.0 <= share <= 1.0:
                raise UserError(f"model.schedule.{name} is {share}; it must be between 0 and 1")
        if self.stages is None:
            return
        if self.decay != "multistep":
            raise UserError(f"model.schedule.stages requires model.schedule.decay multistep, but it is {self.decay}")
        starts, rates = [0.0, *(start for start, _ in self.stages), 1.0], [1.0, *(rate for _, rate in self.stages), 0.0]
        if not all(before < after for before, after in pairwise(starts)):
            raise UserError(f"model.schedule.stages starts at {starts[1:-1]}; starts must increase between 0 and 1")
        if not all(before >= after for before, after in pairwise(rates)):
            raise UserError(f"model.schedule.stages has rates {rates[1:-1]}; rates must decrease between 1 and 0")

    @classmethod
    def default_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return default values, which depend on the other arguments, for arguments that are None.

        ``fit`` saves the default values in ``config.yaml``.
        """
        decay = arguments.get("decay")
        if decay == "multistep":
            return {"stages": DEFAULT_STAGES}
        return {"decay_share": DEFAULT_DECAY_SHARES[decay]} if decay in DEFAULT_DECAY_SHARES else {}

    def factor(self, step: int, total_steps: float) -> float:
        """Return the factor by which the peak learning rate is multiplied at a step.

        Args:
            step: Number of completed optimizer steps.
            total_steps: Number of optimizer steps in the run; infinite if the run is limited only by time. The learning
                rate then stays at its peak, except with ``inverse_sqrt``.
        """
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay == "inverse_sqrt":
            return min(warmup, math.sqrt((self.warmup_steps + 1) / (step + 1)))
        if self.decay == "constant" or math.isinf(total_steps):
            return warmup
        if self.decay == "multistep":
            stages = DEFAULT_STAGES if self.stages is None else self.stages
            return warmup * min((rate for start, rate in stages if step >= round(start * total_steps)), default=1.0)
        share = DEFAULT_DECAY_SHARES[self.decay] if self.decay_share is None else self.decay_share
        length = max(1.0, min(share * total_steps, total_steps - self.warmup_steps))
        remaining = min(1.0, max(0.0, (total_steps - step) / length))  # 1 before the decay, 0 after the last step
        shape = 0.5 - 0.5 * math.cos(math.pi * remaining) if self.decay == "cosine" else remaining
        return warmup * (self.final + (1 - self.final) * shape)
