"""Describe and change the sharding of ``DTensor`` parameters, gradients and optimizer states.

Elementwise operations are applied to the local shards (``model.local_shard``), which requires no communication and is
considerably faster than operating on the ``DTensor``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def sharding_of(tensor: Tensor) -> tuple[DeviceMesh | None, tuple[Placement, ...]]:
    """Return the device mesh and placements of a ``DTensor``, or (None, ()) for any other tensor."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else (None, ())


class ShardedMatrices:
    """Helper that gathers a batch of N matrices with the same shape and sharding, and shards them again.

    Each of them can also be a stack of matrices. Stacks that are sharded into whole matrices are gathered only if
    ``replicate`` is True.

    Args:
        like: Matrix or stack, of shape (..., rows, columns), that has the shape and sharding of all of them.
        count: Number of matrices (N).
        replicate: Whether to gather all matrices on every process. If False, each process gathers only some of the
            matrices.
    """

    def __init__(self, like: Tensor, count: int, replicate: bool = False) -> None:
        mesh, placements = sharding_of(like)
        sharded = [placement.dim for placement in placements if isinstance(placement, Shard | _StridedShard)]
        is_whole = like.ndim > 2 and all(dim < like.ndim - 2 for dim in sharded)
        self.mesh = None if is_whole and not replicate else mesh
        if self.mesh is not None:
            self._shape = torch.Size((count, *like.shape))
            self._sharded = _prepend_dimension(placements)
            self._gathered = [Replicate() if replicate else Shard(0)] * self.mesh.ndim

    def gather(self, shards: Tensor) -> Tensor:
        """Gather the n full matrices assigned to this process: (N, local rows, local columns) -> (n, rows, columns).

        Stacks have further dimensions in between.

        If ``replicate`` is True, n is N.
        """
        return shards if self.mesh is None else self._redistribute(shards, self._sharded, self._gathered)

    def shard(self, whole: Tensor) -> Tensor:
        """Shard full matrices: (n, rows, columns) -> (N, local rows, local columns); the inverse of ``gather``."""
        return whole if self.mesh is None else self._redistribute(whole, self._gathered, self._sharded)

    def _redistribute(self, local: Tensor, source: Sequence[Placement], target: Sequence[Placement]) -> Tensor:
        assert self.mesh is not None
        stride = tuple(math.prod(self._shape[n:]) for n in range(1, len(self._shape) + 1))  # contiguous
        batch = DTensor.from_local(local.contiguous(), self.mesh, source, shape=self._shape, stride=stride)
        return batch.redistribute(placements=target).to_local()


def _prepend_dimension(placements: Sequence[Placement]) -> list[Placement]:
    """Return the placements of a tensor after adding a leading dimension that is not sharded."""
    shifted: list[Placement] = []
    for placement in placements:
        if isinstance(placement, _StridedShard):  # FSDP2 on top of tensor parallelism, both sharding rows
            shifted.append(_StridedShard(placement.dim + 1, split_factor=placement.split_factor))
        elif isinstance(placement, Shard):
            shifted.append(Shard(placement.dim + 1))
        else:
            shifted.append(placement)
    return shifted
