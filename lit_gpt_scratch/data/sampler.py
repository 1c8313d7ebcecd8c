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
        super().__init__(range(n_windows), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
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
    """Validation: all windows once, dealt out to the ranks; none is repeated to make ranks even."""

    def __init__(self, n_windows: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(n_windows), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.mine = range(rank, n_windows, world_size)

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[int]:
        return iter(self.mine)
