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

Kind = Literal["non_finite", "spike"]

WIDTH: Final = 64
"""Steps that a new one is compared with."""
ENOUGH: Final = 20
"""Steps before the first of which anything can stand out."""
DEVIATIONS: Final = 12.0
"""Of the loss. Healthy runs reach 4: the largest of 20 runs of ten shapes, 300 steps each. In batches of six short
windows a table of Unicode's among the sources has reached 9."""
LEAST: Final = 0.02
"""What a deviation is at least, of the median and in nats, where the losses before were all but alike."""
RATIO: Final = 30.0
"""Of the norm to the median. The same runs reach 7."""
PATIENCE: Final = 8
"""Steps in a row that stand out, after which it is no matter of a batch: the level is another one."""
OF_NORMAL: Final = 1.4826
"""Standard deviation of a normal distribution, by the median of its absolute deviations."""


class Watch:
    """Judges one step after the other. Its state is plain numbers.

    Attributes:
        in_a_row: How many steps stood out without one between that did not, or since the run went back.
        stood_out: Whether the last step did.
        deviations: How far the last loss lay above the median, in deviations; 0 as long as too little is known.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WIDTH)
        self.norms: deque[float] = deque(maxlen=WIDTH)
        self.in_a_row = 0
        self.stood_out = False
        self.deviations = 0.0

    def judge(self, loss: float, norm: float) -> Kind | None:
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
        return len(self.losses) >= ENOUGH and not self.stood_out

    def forget(self) -> None:
        """Begin anew, at another level."""
        self.losses.clear()
        self.norms.clear()
        self.in_a_row = 0

    def _kind(self, loss: float, norm: float) -> Kind | None:
        self.deviations = 0.0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "non_finite"
        if len(self.losses) < ENOUGH:
            return None
        median = self.median
        if loss > median:  # half of all steps are done with here
            spread = OF_NORMAL * statistics.median(abs(other - median) for other in self.losses)
            self.deviations = (loss - median) / max(spread, LEAST * abs(median), LEAST)
        return "spike" if self.deviations > DEVIATIONS or norm > RATIO * self.usual_norm > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """All that it knows."""
        known = {"losses": list(self.losses), "norms": list(self.norms)}
        return {**known, "in_a_row": self.in_a_row, "stood_out": self.stood_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.losses = deque(state["losses"], WIDTH)
        self.norms = deque(state["norms"], WIDTH)
        self.in_a_row = state["in_a_row"]
        self.stood_out = state.get("stood_out", self.in_a_row > 0)  # older checkpoints do not say
