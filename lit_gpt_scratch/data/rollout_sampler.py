"""Which row comes when, where a policy first writes many rows and then learns from them in several passes."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lit_gpt_scratch.batch_types import PromptIndexBatch, RolloutPhase
from lit_gpt_scratch.data.sampler import Permutations, ShuffledOrder, ShuffledSampler


class RolloutSampler(ShuffledSampler):
    """The training order of one rank: rows are numbered through the run, and a phase of them comes several times.

    The first pass of a phase takes its rows in their order, every later one in another. As in ``ShuffledSampler`` a
    step sees the same rows however many ranks and micro-batches deal them out. An epoch is the whole phases that have
    as many rows as there are prompts, at least one.

    Args:
        prompts: The order of the prompts; its length is an epoch's.
        phase: How a phase is gone through.
        seed: Of the later passes.
        batch_size: As for ``ShuffledSampler``, as are the others.
        rank: This process.
        world_size: Number of data-parallel processes.
        start: The epoch and the micro-batch in it at which to begin.
        accumulate: Micro-batches per optimizer step.
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
    ) -> None:
        super().__init__(prompts, batch_size, rank, world_size, start, accumulate)
        self.phase = phase
        self.micro_batches_a_pass = phase.steps * accumulate
        self.rows = self.micro_batches_a_pass * batch_size * world_size
        """Of a phase, over all ranks."""
        self.phases = max(1, len(prompts) // self.rows)
        """In an epoch."""
        self._later = Permutations(self.rows, (seed, 2))  # 0 and 1 are of windows and their stores

    @property
    def micro_batches(self) -> int:
        """Micro-batches in an epoch."""
        return self.phases * self.phase.passes * self.micro_batches_a_pass

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        first = self.start[1] if epoch == self.start[0] else 0
        within = np.arange(self.batch_size)
        for number in range(first, self.micro_batches):
            passes, place = divmod(number, self.micro_batches_a_pass)
            phase, nth = divmod(epoch * self.phases * self.phase.passes + passes, self.phase.passes)
            rows = (place * self.world_size + self.rank) * self.batch_size + within  # (B,)
            if nth:
                rows = self._later.at(phase * self.phase.passes + nth, rows)
            yield from (phase * self.rows + rows).tolist()


def rank_rows(batch_size: int, rank: int, world_size: int, rows: int) -> NDArray[np.int64]:
    """The rows of a phase that a rank sees in the first pass, in that order: (n,)."""
    dealt = np.arange(rows).reshape(-1, world_size, batch_size)  # (micro-batches, ranks, B)
    return dealt[:, rank].ravel()


class PromptIndexDataset(Dataset[PromptIndexBatch]):
    """Rows that are their numbers.

    Args:
        n: How many; the number behind the last stands for a row of nothing.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    @property
    def sizes(self) -> list[int]:
        """All in one part."""
        return [self.n]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> PromptIndexBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> PromptIndexBatch:
        """A whole batch."""
        return PromptIndexBatch(numbers=torch.tensor(indices))
