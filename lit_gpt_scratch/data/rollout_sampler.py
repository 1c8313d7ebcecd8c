"""Sampler for on-policy training: each rollout phase generates replies, then trains on them in several passes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import PromptIndexBatch, RolloutPhase
from lit_gpt_scratch.data.sampler import Permutations, RowDataset, RowIndices, ShuffledOrder, ShuffledSampler


class RolloutSampler(ShuffledSampler):
    """Sampler of one rank's rollouts in training order.

    Rollout numbers keep counting across rollout phases; each phase is trained on in several passes. The first pass
    takes the phase's rollouts in order; each later pass takes them in a different random order. As in
    ``ShuffledSampler``, an optimizer step consists of the same rollouts for any number of ranks and micro-batches. An
    epoch consists of ``len(prompts) // phase_rows`` phases, but at least one.

    Args:
        prompts: Order of the prompts; its length limits the length of an epoch.
        phase: Optimizer steps and passes per rollout phase.
        seed: Seed for the order within later passes.
        batch_size: Rows per rank and micro-batch.
        rank: Data-parallel rank of this process, 0 to ``world_size - 1``.
        world_size: Number of data-parallel ranks.
        start: Epoch to start at, and micro-batch within it.
        accumulate: Micro-batches per optimizer step.
        limit: Value of ``trainer.limit_train_batches``; a step in which this limit falls is shortened to end there.
    """

    def __init__(
        self,
        prompts: ShuffledOrder,
        phase: RolloutPhase,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: tuple[int, int] = (0, 0),
        accumulate: int = 1,
        limit: float = 1.0,
    ) -> None:
        super().__init__(prompts, batch_size, rank, world_size, start, accumulate, limit)
        self.phase = phase
        self.phase_rows = phase.steps * accumulate * batch_size * world_size
        """Rollouts per phase, across all ranks."""
        self.phases = max(1, len(prompts) // self.phase_rows)
        """Phases per epoch."""
        self._later_passes = Permutations(self.phase_rows, (seed, 2))  # ShuffledOrder uses the keys 0 and 1

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in a whole epoch."""
        return self.phases * self.phase.passes * self.phase.steps * self.accumulate

    def rows(self, epoch: int, positions: RowIndices) -> RowIndices:
        """Return the rollout numbers at given positions of an epoch: (n,) int64 -> (n,) int64."""
        passes, within = np.divmod(positions, self.phase_rows)  # passes since the epoch's start, over all phases
        passes += epoch * self.phases * self.phase.passes
        phase, nth = np.divmod(passes, self.phase.passes)
        within = np.where(nth > 0, self._later_passes.at(passes, within), within)
        return phase * self.phase_rows + within


class PromptIndexDataset(RowDataset[PromptIndexBatch]):
    """A dataset whose rows are only indices, because the policy generates the rollouts.

    Args:
        n: Number of prompts; the index ``n`` denotes a padding row.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def make_batch(self, rows: Sequence[int]) -> PromptIndexBatch:
        """Build the batch for the given row indices."""
        return PromptIndexBatch(indices=torch.tensor(rows))

    def count_labels(self, rows: RowIndices) -> dict[str, Tensor]:
        """Return ``step_indices``, the row indices from which the policy counts the step's labels."""
        return {"step_indices": torch.from_numpy(rows)}
