"""Which steps stand out from those before them.

A loss is compared with the median of the last ones in deviations, a gradient's norm by its ratio, because norms of
healthy runs are far from normally distributed. After OLMo's rule of skipping what lies six standard deviations out
(https://arxiv.org/abs/2501.00656, section 3.2), with medians in the place of means, so that what stood out does not
hide what comes next.
"""

import math
import statistics
from collections import deque
from typing import Any, Final, Literal

StepKind = Literal["non_finite", "spike"]

WINDOW: Final = 64
"""Steps that a new one is compared with."""
MIN_STEPS: Final = 20
"""Steps before the first of which anything can stand out."""
MAX_DEVIATIONS: Final = 12.0
"""Of the loss. Healthy runs reach 4: the largest of 20 runs of ten shapes, 300 steps each. In batches of six short
windows a table of Unicode's among the sources has reached 9."""
MIN_DEVIATION: Final = 0.02
"""What a deviation is at least, of the median and in nats, where the losses before were all but alike."""
MAX_NORM_RATIO: Final = 30.0
"""Of the norm to the median. The same runs reach 7."""
PATIENCE: Final = 8
"""Steps in a row that stand out, after which it is no matter of a batch: the level is another one."""
MAD_TO_STD: Final = 1.4826
"""Standard deviation of a normal distribution, by the median of its absolute deviations."""


class SpikeDetector:
    """Judges one step after the other. Its state is plain numbers.

    Attributes:
        in_a_row: How many steps stood out without one between that did not, or since the run went back.
        stood_out: Whether the last step did.
        deviations: How far the last loss lay above the median, in deviations; 0 as long as too little is known.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0
        self.stood_out = False
        self.deviations = 0.0

    def judge(self, loss: float, norm: float) -> StepKind | None:
        """Whether a step stands out, and how; one that does not is what later ones are compared with.

        Args:
            loss: Mean over the step's labels; NaN where it is not known and never was.
            norm: Of the gradient before it is clipped.
        """
        kind = self._kind(loss, norm)
        self.stood_out = kind is not None
        self.in_a_row = self.in_a_row + 1 if kind else 0
        if kind is None:
            self.losses.append(loss)
            self.norms.append(norm)
        return kind

    @property
    def median(self) -> float:
        """Of the losses that a new one is compared with."""
        return statistics.median(self.losses)

    @property
    def usual_norm(self) -> float:
        """The same of the norms."""
        return statistics.median(self.norms)

    @property
    def calm(self) -> bool:
        """Whether enough is known, and the last step did not stand out."""
        return len(self.losses) >= MIN_STEPS and not self.stood_out

    def forget(self) -> None:
        """Begin anew, at another level."""
        self.losses.clear()
        self.norms.clear()
        self.in_a_row = 0

    def _kind(self, loss: float, norm: float) -> StepKind | None:
        self.deviations = 0.0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "non_finite"
        if len(self.losses) < MIN_STEPS:
            return None
        median = self.median
        if loss > median:  # half of all steps are done with here
            spread = MAD_TO_STD * statistics.median(abs(other - median) for other in self.losses)
            self.deviations = (loss - median) / max(spread, MIN_DEVIATION * abs(median), MIN_DEVIATION)
        return "spike" if self.deviations > MAX_DEVIATIONS or norm > MAX_NORM_RATIO * self.usual_norm > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """All that it knows."""
        known = {"losses": list(self.losses), "norms": list(self.norms)}
        return {**known, "in_a_row": self.in_a_row, "stood_out": self.stood_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.losses = deque(state["losses"], WINDOW)
        self.norms = deque(state["norms"], WINDOW)
        self.in_a_row = state["in_a_row"]
        self.stood_out = state.get("stood_out", self.in_a_row > 0)  # older checkpoints do not say
