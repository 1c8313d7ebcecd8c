"""Sampler for on-policy training, which alternates between generating rollouts and training on them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import PromptIndexBatch, RolloutPhase
from lit_gpt_scratch.data.sampler import Permutations, RowDataset, RowIndices, ShuffledOrder, ShuffledSampler
from lit_gpt_scratch.errors import UserError


class RolloutSampler(ShuffledSampler):
    """Sampler that yields one rank's rollouts in training order.

    In each phase, rollouts are generated once, and training makes several passes over them: the first pass visits them
    in order, and each later pass visits them in a different random order. Rollouts are indexed consecutively across
    all phases. As in ``ShuffledSampler``, an optimizer step consists of the same rollouts for any number of ranks and
    micro-batches. An epoch consists of ``max(1, len(prompts) // phase_rows)`` phases.

    Args:
        prompts: Shuffled order of the prompts; its length determines the number of phases per epoch.
        phase: Number of optimizer steps per pass, and number of passes per phase.
        seed: Seed for the order of the rollouts in later passes.
        batch_size: Rows per rank and micro-batch.
        rank: Data-parallel rank of this process, 0 to ``world_size - 1``.
        world_size: Number of data-parallel ranks.
        start: Epoch to start at, and micro-batch within that epoch.
        accumulate: Micro-batches per optimizer step.
        limit: Value of ``trainer.limit_train_batches``. An optimizer step that would exceed this limit is shortened.
        repeats: Must be False, because rollouts cannot be repeated.

    Raises:
        UserError: ``repeats`` is True.
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
        repeats: bool = False,
    ) -> None:
        if repeats:
            raise UserError(
                "--trainer.overfit_batches would repeat rollouts of earlier policies; use --trainer.limit_train_batches"
            )
        super().__init__(prompts, batch_size, rank, world_size, start, accumulate, limit)
        self.phase = phase
        self.phase_rows = phase.steps * accumulate * batch_size * world_size
        """Number of rollouts per phase, across all ranks."""
        self.phases = max(1, len(prompts) // self.phase_rows)
        """Number of phases per epoch."""
        self._later_passes = Permutations(self.phase_rows, (seed, 2))  # ShuffledOrder uses the keys 0 and 1

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in a full epoch."""
        return self.phases * self.phase.passes * self.phase.steps * self.accumulate

    def rows(self, epoch: int, positions: RowIndices) -> RowIndices:
        """Return the rollout indices at the given positions of an epoch; both are int64 arrays of shape (n,)."""
        passes, within = np.divmod(positions, self.phase_rows)  # passes since the start of the epoch, over all phases
        passes += epoch * self.phases * self.phase.passes
        phase, nth = np.divmod(passes, self.phase.passes)
        within = np.where(nth > 0, self._later_passes.at(passes, within), within)
        return phase * self.phase_rows + within


class PromptIndexDataset(RowDataset[PromptIndexBatch]):
    """Dataset whose rows are only indices, because the policy generates the rollouts.

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
        """Return the batch entry ``step_indices``: the row indices of the optimizer step, used to count its labels."""
        return {"step_indices": torch.from_numpy(rows)}
