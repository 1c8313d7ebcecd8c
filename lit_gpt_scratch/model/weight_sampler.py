"""Random initial weights that are the same however a parameter is sharded."""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from lit_gpt_scratch.model.local_shard import shard_slices, to_local

Draw = Callable[[np.random.Generator, tuple[int, ...]], "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"]

BLOCK_ELEMENTS: Final = 2**16
"""Number of consecutive elements that one generator draws, rounded to whole rows of the parameter."""


class WeightSampler:
    """Draws weights that depend only on a seed, the name of the parameter and the position within the parameter.

    The weights are therefore the same with every sharding, on every device and, up to rounding, in every dtype, and do
    not depend on which other parameters exist. A process draws only the blocks of rows that overlap its shard (of a
    parameter whose columns are sharded, all blocks), each with an independent generator
    (https://numpy.org/doc/stable/reference/random/parallel.html).

    Args:
        module: Module that contains the parameters.
        seed: Random seed, nonnegative.
    """

    def __init__(self, module: nn.Module, seed: int) -> None:
        self._seed = seed
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}

    def normal_(self, weight: Tensor, std: float) -> None:
        """Fill a parameter in place from a normal distribution with mean zero."""
        self._fill(weight, lambda rng, shape: rng.standard_normal(shape, np.float32) * np.float32(std))

    def uniform_(self, weight: Tensor, bound: float) -> None:
        """Fill a parameter in place from a uniform distribution over [-bound, bound)."""
        self._fill(weight, lambda rng, shape: (2 * rng.random(shape, np.float32) - 1) * np.float32(bound))

    def _fill(self, weight: Tensor, draw: Draw) -> None:
        local = to_local(weight)
        n_rows, *rest = weight.shape
        rows, *others = shard_slices(weight)
        if rows.start == rows.stop:  # an empty shard
            return
        per_block = max(1, BLOCK_ELEMENTS // math.prod(rest))
        name = int.from_bytes(self._names[id(weight)].encode(), "little")
        for first in range(rows.start // per_block * per_block, rows.stop, per_block):
            last = min(first + per_block, n_rows)
            rng = np.random.default_rng(np.random.SeedSequence((self._seed, name), spawn_key=(first // per_block,)))
            block = torch.from_numpy(draw(rng, (last - first, *rest)))
            start, stop = max(first, rows.start), min(last, rows.stop)
            local[start - rows.start : stop - rows.start] = block[(slice(start - first, stop - first), *others)]


def draw_seed() -> int:
    """Draw a random seed from torch's global generator."""
    return int(torch.randint(2**62, (), device="cpu"))
