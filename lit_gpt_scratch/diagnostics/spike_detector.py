"""Detect steps whose loss or gradient norm is an outlier among recent steps.

The loss is measured by its distance to the median of recent losses, in standard deviations estimated from their median
absolute deviation (MAD). The gradient norm is measured by its ratio to the median of recent norms, because gradient
norms of healthy runs are far from normally distributed. The method follows OLMo's rule of skipping steps that are six
standard deviations above the mean (https://arxiv.org/abs/2501.00656, section 3.2), but uses medians, so that an outlier
does not hide the next outlier.
"""

import math
import statistics
from collections import deque
from typing import Any, Final, Literal

from typing_extensions import NotRequired, TypedDict

StepKind = Literal["non_finite", "spike"]

WINDOW: Final = 64
"""Number of recent normal steps that a new step is compared with."""
MIN_STEPS: Final = 20
"""Number of normal steps required before a step can be a spike."""
MAX_DEVIATIONS: Final = 12.0
"""Distance of a loss above the median, in standard deviations, beyond which the step is a spike.

The standard deviation is estimated from the MAD. The largest distance in 20 healthy runs, which cover ten model shapes
and have 300 steps each, is 4. With batches of six short windows, a Unicode table in Python's standard library has
caused a distance of 9.
"""
MIN_DEVIATION: Final = 0.02
"""Lower bound on the estimated standard deviation, both in nats and as a fraction of the median loss.

Otherwise, a tiny rise of a nearly constant loss would be a spike.
"""
MAX_NORM_RATIO: Final = 30.0
"""Ratio of the gradient norm to the median norm above which the step is a spike. Healthy runs reach 7."""
PATIENCE: Final = 8
"""Number of consecutive outliers that are attributed to a new loss level; fewer are attributed to unusual batches."""
MAD_TO_STD: Final = 1.4826
"""Ratio of standard deviation to median absolute deviation (MAD) for a normal distribution."""


class SpikeDetectorState(TypedDict):
    """State of a ``SpikeDetector``; older checkpoints lack ``stood_out``."""

    losses: list[float]
    norms: list[float]
    in_a_row: int
    stood_out: NotRequired[bool]


class SpikeDetector:
    """Detector that classifies each optimizer step as normal or as an outlier.

    Attributes:
        in_a_row: Number of consecutive outliers; also reset to 0 when the run is rewound to a checkpoint.
        is_outlier: Whether the last step was an outlier.
        deviations: Distance of the last loss above the median in standard deviations (estimated from the MAD), or 0 if
            it was not above the median or if too few steps have been recorded.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0
        self.is_outlier = False
        self.deviations = 0.0

    def classify_step(self, loss: float, norm: float) -> StepKind | None:
        """Return the type of outlier, or None for a normal step; only normal steps are recorded for later comparisons.

        Args:
            loss: Mean loss over the labels of the step; 0 if the task reports no loss.
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
        """Median of the recorded losses, with which a new loss is compared."""
        return statistics.median(self.losses)

    @property
    def median_norm(self) -> float:
        """Median of the recorded gradient norms, with which a new norm is compared."""
        return statistics.median(self.norms)

    @property
    def is_calm(self) -> bool:
        """Whether enough steps have been recorded and the last step was normal."""
        return len(self.losses) >= MIN_STEPS and not self.is_outlier

    def reset(self) -> None:
        """Discard all recorded steps, to start over at a new loss level."""
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
        if loss > median:  # otherwise, skip the computation of the MAD
            spread = MAD_TO_STD * statistics.median(abs(other - median) for other in self.losses)
            self.deviations = (loss - median) / max(spread, MIN_DEVIATION * abs(median), MIN_DEVIATION)
        is_spike = self.deviations > MAX_DEVIATIONS or norm > MAX_NORM_RATIO * self.median_norm > 0
        return "spike" if is_spike else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state, including the recorded losses and norms, as plain Python values."""
        known = {"losses": list(self.losses), "norms": list(self.norms)}
        return {**known, "in_a_row": self.in_a_row, "stood_out": self.is_outlier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by ``state_dict``."""
        self.losses = deque(state["losses"], WINDOW)
        self.norms = deque(state["norms"], WINDOW)
        self.in_a_row = state["in_a_row"]
        self.is_outlier = state.get("stood_out", self.in_a_row > 0)  # missing in older checkpoints
