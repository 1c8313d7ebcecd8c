"""The order of rollouts in on-policy training: a phase generates many, and then trains on them in several passes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import PromptIndexBatch, RolloutPhase
from lit_gpt_scratch.data.sampler import Permutations, RowDataset, RowIndices, ShuffledOrder, ShuffledSampler


class RolloutSampler(ShuffledSampler):
    """The training order of one rank: rollouts are numbered through the run, and a phase of them comes several times.

    The first pass over a phase takes its rollouts in order, every later one in a different order. As in
    ``ShuffledSampler`` a step consists of the same rollouts whatever the number of ranks and micro-batches. An epoch is
    as many whole phases as there are prompts for, at least one.

    Args:
        prompts: The order of the prompts; its length bounds an epoch's.
        phase: Length of a phase.
        seed: Of the order of the later passes.
        batch_size: As for ``ShuffledSampler``, as are the others.
        rank: The data-parallel rank of this process.
        world_size: Number of data-parallel ranks.
        start: Epoch, and micro-batch in it, at which to start.
        accumulate: Micro-batches per optimizer step.
        limit: ``trainer.limit_train_batches``.
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
        """Rollouts of a phase, over all ranks."""
        self.phases = max(1, len(prompts) // self.phase_rows)
        """Phases of an epoch."""
        self._later_passes = Permutations(self.phase_rows, (seed, 2))  # keys 0 and 1 are ShuffledOrder's

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a whole epoch."""
        return self.phases * self.phase.passes * self.phase.steps * self.accumulate

    def rows(self, epoch: int, positions: RowIndices) -> RowIndices:
        """The rollouts at some positions of an epoch: (n,) int64 -> (n,) int64."""
        passes, within = np.divmod(positions, self.phase_rows)  # passes over any phase since the epoch's start
        passes += epoch * self.phases * self.phase.passes
        phase, nth = np.divmod(passes, self.phase.passes)
        within = np.where(nth > 0, self._later_passes.at(passes, within), within)
        return phase * self.phase_rows + within


class PromptIndexDataset(RowDataset[PromptIndexBatch]):
    """Rows that consist of their index: the policy generates rollouts itself.

    Args:
        n: Number of prompts; the index ``n`` stands for a padding row.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def make_batch(self, rows: Sequence[int]) -> PromptIndexBatch:
        """The batch of some rows."""
        return PromptIndexBatch(indices=torch.tensor(rows))

    def count_labels(self, rows: RowIndices) -> dict[str, Tensor]:
        """``step_indices``: the policy counts the tokens of these rollouts itself."""
        return {"step_indices": torch.from_numpy(rows)}
