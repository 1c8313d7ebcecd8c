"""Which window comes when: a pure function, with no state to lose."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DistributedSampler


class WindowOrder(DistributedSampler[int]):
    """The training order of one rank.

    Step ``s`` of an epoch takes the windows ``permutation(seed, epoch)[s * B * W : (s + 1) * B * W]`` for
    ``W`` ranks of ``B`` windows each, rank ``r`` the ``r``-th part of them. So the global sequence does not
    depend on how many ranks share it, and a run goes on at any step without replaying those before. Windows
    that fill no whole step are left out; which ones differs by epoch.

    A ``DistributedSampler``, because Lightning puts its own order in place of any other kind of sampler.

    Args:
        n_windows: Windows in the corpus.
        batch_size: Windows per rank and step.
        seed: Changes the permutations.
        rank: This process, 0 to ``world_size - 1``.
        world_size: Number of data-parallel processes.
        start: The epoch and the step in it at which to begin; later epochs begin at step 0.
    """

    def __init__(
        self,
        n_windows: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(range(n_windows), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]  # a length will do
        self.n_windows = n_windows
        self.batch_size = batch_size
        self.world_size = world_size
        self.start = start
        self.epoch = start[0]

    def __len__(self) -> int:
        """Windows of this rank in a whole epoch."""
        return self.n_windows // (self.batch_size * self.world_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        permutation = np.random.default_rng((self.seed, self.epoch)).permutation(self.n_windows)
        steps = len(self) // self.batch_size
        by_step = permutation[: steps * self.world_size * self.batch_size].reshape(
            steps, self.world_size, self.batch_size
        )
        first = self.start[1] if self.epoch == self.start[0] else 0
        yield from by_step[first:, self.rank].ravel().tolist()


class EveryWindow(DistributedSampler[int]):
    """Validation: all windows once, dealt out to the ranks in whole batches.

    What is missing to whole batches, the same number on every rank, is filled with the index behind the last
    window, which stands for a window without labels: batches keep one shape, and nothing is scored twice.

    Args:
        n_windows: Windows in the corpus.
        batch_size: Windows per rank and step.
        rank: This process.
        world_size: Number of data-parallel processes.
    """

    def __init__(self, n_windows: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(n_windows), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]  # a length will do
        self.n_windows = n_windows
        self.per_rank = -(-n_windows // (batch_size * world_size)) * batch_size
        self.world_size = world_size

    def __len__(self) -> int:
        return self.per_rank

    def __iter__(self) -> Iterator[int]:
        for place in range(self.per_rank):
            yield min(place * self.world_size + self.rank, self.n_windows)
