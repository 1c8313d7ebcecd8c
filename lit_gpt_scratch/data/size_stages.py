"""Sizes that grow in stages during a run: tokens per optimizer step, and tokens per window."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from lit_gpt_scratch.errors import UserError

Stages = tuple[tuple[float, int], ...]
"""End of each stage as a fraction of the run's tokens, and the size in this stage."""


def validate_stages(flag: str, stages: Stages, final: int) -> None:
    """Check that stages end one after another within the run, and that each size divides the next one.

    Step boundaries of a small size are then also boundaries of a larger one.

    Args:
        flag: Name of the flag, for error messages, such as ``data.block_size``; its stages are ``{flag}_stages``.
        stages: Value of ``{flag}_stages``.
        final: Value of the flag itself, the size after the last stage.

    Raises:
        UserError: There is no stage, or a stage is invalid.
    """
    ends, sizes = [end for end, _ in stages], [*(size for _, size in stages), final]
    if not stages:
        raise UserError(f"data.{flag}_stages is empty; omit it to use data.{flag} in the whole run")
    if not all(before < after for before, after in pairwise([0.0, *ends, 1.0])):
        raise UserError(f"data.{flag}_stages ends at {ends}; ends must increase between 0 and 1")
    for before, after in pairwise(sizes):
        if not 0 < before < after or after % before:
            raise UserError(
                f"data.{flag}_stages grows from {before} to {after}; each size must be positive and divide the next "
                f"one, and the last one must divide data.{flag}"
            )


class Phase(NamedTuple):
    """Part of a run with a constant size.

    Attributes:
        first: First micro-batch of the phase, counted from the start of the run.
        end: First micro-batch after the phase, or infinity for the last phase.
        size: Size in this phase.
    """

    first: int
    end: float
    size: int


def size_at(phases: Sequence[Phase], micro_batch: int) -> int:
    """Return the size at a micro-batch, counted from the start of the run."""
    return next(phase.size for phase in phases if micro_batch < phase.end)


@dataclass(frozen=True)
class SizeStages:
    """Stages of the two sizes, and the limits of the run, which determine where its stages end.

    The last stage of each size is the one after the growth; its end is ignored.

    Args:
        step_sizes: Stages of the number of micro-batches per optimizer step.
        windows: Stages of the number of tokens per window.
        max_steps: Maximum number of optimizer steps in the run, or -1.
        max_epochs: Maximum number of epochs in the run, or -1.
    """

    step_sizes: Stages
    windows: Stages
    max_steps: int
    max_epochs: int

    def run_length(self, per_epoch: int) -> float:
        """Return the number of micro-batches in the run, for epochs of ``per_epoch`` micro-batches.

        With ``max_steps``, it is the length for which fractions of the run's tokens in stages of different step sizes
        add up to that number of steps.
        """
        by_epochs = math.inf if self.max_epochs == -1 else self.max_epochs * per_epoch
        if self.max_steps == -1:
            return by_epochs
        starts = [0.0, *(end for end, _ in self.step_sizes[:-1]), 1.0]
        shares = [after - before for before, after in pairwise(starts)]
        steps_per_epoch = sum(
            share * math.ceil(per_epoch / size) for share, (_, size) in zip(shares, self.step_sizes, strict=True)
        )
        return min(by_epochs, self.max_steps * per_epoch / steps_per_epoch)

    def phases(self, per_epoch: int, per_step: int) -> tuple[list[Phase], list[Phase]]:
        """Return the phases of the number of micro-batches per step, and of the number of tokens per window.

        A phase ends where a step of the final size would begin, so that it contains only whole steps and all sizes
        apply to the same rows in the same order.

        Args:
            per_epoch: Number of micro-batches per epoch.
            per_step: Number of micro-batches in a step of the final size.
        """
        length = self.run_length(per_epoch)

        def place(stages: Stages) -> list[Phase]:
            ends = [_next_step(end * length, per_epoch, per_step) for end, _ in stages[:-1]]
            return [
                Phase(first, end, size)
                for first, end, (_, size) in zip([0, *ends], [*ends, math.inf], stages, strict=True)
            ]

        return place(self.step_sizes), place(self.windows)


def _next_step(micro_batch: float, per_epoch: int, per_step: int) -> int:
    """Return the first micro-batch of the first step at or after a micro-batch; each epoch begins with a new step."""
    epoch, within = divmod(math.ceil(micro_batch), per_epoch)
    within = -(-within // per_step) * per_step
    return epoch * per_epoch + min(within, per_epoch)
