"""Access to the local shards of ``DTensor`` parameters, gradients and optimizer states.

Elementwise operations run on the local shard. That requires no communication, and is considerably faster than operating
on the ``DTensor``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def to_local(tensor: Tensor) -> Tensor:
    """Return the local shard of a tensor, which shares its memory; the tensor itself if it is not a ``DTensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharding_of(tensor: Tensor) -> tuple[DeviceMesh | None, tuple[Placement, ...]]:
    """Return the mesh and placements of a tensor; (None, ()) if it is not a ``DTensor``."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else (None, ())


class ShardedMatrices:
    """Gathers N matrices with the same shape and sharding as one batch, and shards them again.

    Args:
        like: One of the matrices, (rows, columns).
        count: Number of matrices (N).
        replicate: Whether to gather all matrices on every process, instead of distributing whole matrices over the
            processes.
    """

    def __init__(self, like: Tensor, count: int, replicate: bool = False) -> None:
        self.mesh = like.device_mesh if isinstance(like, DTensor) else None
        if isinstance(like, DTensor):
            self._shape = torch.Size((count, *like.shape))
            self._sharded = _prepend_dimension(like.placements)
            self._gathered = [Replicate() if replicate else Shard(0)] * like.device_mesh.ndim

    def gather(self, shards: Tensor) -> Tensor:
        """Gather the whole matrices assigned to this process: (N, local rows, local columns) -> (n, rows, columns)."""
        return shards if self.mesh is None else self._redistribute(shards, self._sharded, self._gathered)

    def shard(self, whole: Tensor) -> Tensor:
        """Shard whole matrices: (n, rows, columns) -> (N, local rows, local columns); the inverse of ``gather``."""
        return whole if self.mesh is None else self._redistribute(whole, self._gathered, self._sharded)

    def _redistribute(self, local: Tensor, source: Sequence[Placement], target: Sequence[Placement]) -> Tensor:
        assert self.mesh is not None
        _, rows, columns = self._shape
        stride = (rows * columns, columns, 1)
        batch = DTensor.from_local(local.contiguous(), self.mesh, source, shape=self._shape, stride=stride)
        return batch.redistribute(placements=target).to_local()


def _prepend_dimension(placements: Sequence[Placement]) -> list[Placement]:
    """Return the placements for a tensor with an additional leading dimension, sharded the same way."""
    shifted: list[Placement] = []
    for placement in placements:
        if isinstance(placement, _StridedShard):  # FSDP2 on top of tensor parallelism, both sharding rows
            shifted.append(_StridedShard(placement.dim + 1, split_factor=placement.split_factor))
        elif isinstance(placement, Shard):
            shifted.append(Shard(placement.dim + 1))
        else:
            shifted.append(placement)
    return shifted
