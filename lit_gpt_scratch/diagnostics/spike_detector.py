"""Detects steps whose loss or gradient norm is an outlier among those before.

A loss is compared with the median of the last ones in units of their deviation, a gradient norm by its ratio to the
median, because gradient norms of healthy runs are far from normally distributed. After OLMo's rule of skipping steps
six standard deviations out (https://arxiv.org/abs/2501.00656, section 3.2), with medians instead of means, so that an
outlier does not hide the next one.
"""

import math
import statistics
from collections import deque
from typing import Any, Final, Literal

StepKind = Literal["non_finite", "spike"]

WINDOW: Final = 64
"""Steps that a new one is compared with."""
MIN_STEPS: Final = 20
"""Steps before anything can be a spike."""
MAX_DEVIATIONS: Final = 12.0
"""Deviations of the loss. Healthy runs reach 4: the largest of 20 runs of ten shapes, 300 steps each. In batches of six
short windows a Unicode table in the standard library's sources has reached 9."""
MIN_DEVIATION: Final = 0.02
"""Least deviation, relative to the median and in nats, where the earlier losses were nearly equal."""
MAX_NORM_RATIO: Final = 30.0
"""Gradient norm over the median norm. The same runs reach 7."""
PATIENCE: Final = 8
"""Outlier steps in a row from which on it is not a batch that is unusual: the level has changed."""
MAD_TO_STD: Final = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class SpikeDetector:
    """Classifies one step after the other. Its state is plain numbers.

    Attributes:
        in_a_row: Outlier steps in a row, or since the run was rewound.
        is_outlier: Whether the last step was one.
        deviations: How far the last loss was above the median, in deviations; 0 while too few steps are known.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0
        self.is_outlier = False
        self.deviations = 0.0

    def classify_step(self, loss: float, norm: float) -> StepKind | None:
        """Kind of outlier, or None for a normal step, which later ones are compared with.

        Args:
            loss: Mean over the step's labels; 0 if the task reports none.
            norm: Gradient norm before clipping.
        """
        kind = self._kind(loss, norm)
        self.is_outlier = kind is not None
        self.in_a_row = self.in_a_row + 1 if kind else 0
        if kind is None:
            self.losses.append(loss)
            self.norms.append(norm)
        return kind

    @property
    def median_loss(self) -> float:
        """Median of the losses that a new one is compared with."""
        return statistics.median(self.losses)

    @property
    def median_norm(self) -> float:
        """Median of the gradient norms that a new one is compared with."""
        return statistics.median(self.norms)

    @property
    def is_calm(self) -> bool:
        """Whether enough steps are known, and the last one was normal."""
        return len(self.losses) >= MIN_STEPS and not self.is_outlier

    def reset(self) -> None:
        """Start over, at another level."""
        self.losses.clear()
        self.norms.clear()
        self.in_a_row = 0

    def _kind(self, loss: float, norm: float) -> StepKind | None:
        self.deviations = 0.0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "non_finite"
        if len(self.losses) < MIN_STEPS:
            return None
        median = self.median_loss
        if loss > median:  # the lower half of all steps needs no more work
            spread = MAD_TO_STD * statistics.median(abs(other - median) for other in self.losses)
            self.deviations = (loss - median) / max(spread, MIN_DEVIATION * abs(median), MIN_DEVIATION)
        is_spike = self.deviations > MAX_DEVIATIONS or norm > MAX_NORM_RATIO * self.median_norm > 0
        return "spike" if is_spike else None

    def state_dict(self) -> dict[str, Any]:
        """The whole state."""
        known = {"losses": list(self.losses), "norms": list(self.norms)}
        return {**known, "in_a_row": self.in_a_row, "stood_out": self.is_outlier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.losses = deque(state["losses"], WINDOW)
        self.norms = deque(state["norms"], WINDOW)
        self.in_a_row = state["in_a_row"]
        self.is_outlier = state.get("stood_out", self.in_a_row > 0)  # older checkpoints lack it
