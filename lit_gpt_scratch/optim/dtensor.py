"""Access to the local shards of parameters, gradients and optimizer states that are sharded as ``DTensor``.

Elementwise operations are done on this process's shard, without communication; that is also a good deal faster than
through the ``DTensor``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, in the same memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharding_of(tensor: Tensor) -> tuple[DeviceMesh | None, tuple[Placement, ...]]:
    """Mesh and placements of a tensor; (None, ()) if it is not sharded."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else (None, ())


class ShardedMatrices:
    """Gathers a batch of N matrices with the same shape and sharding, and shards them again.

    Args:
        like: One of the parameters, (rows, columns).
        count: N.
        replicate: Gather all matrices on every process, instead of distributing whole matrices over the processes.
    """

    def __init__(self, like: Tensor, count: int, replicate: bool = False) -> None:
        self.mesh = like.device_mesh if isinstance(like, DTensor) else None
        if isinstance(like, DTensor):
            self._shape = torch.Size((count, *like.shape))
            self._sharded = _prepend_dimension(like.placements)
            self._gathered = [Replicate() if replicate else Shard(0)] * like.device_mesh.ndim

    def gather(self, shards: Tensor) -> Tensor:
        """(N, local rows, local columns) -> (n, rows, columns), the whole matrices of this process."""
        return shards if self.mesh is None else self._redistribute(shards, self._sharded, self._gathered)

    def shard(self, whole: Tensor) -> Tensor:
        """(n, rows, columns) -> (N, local rows, local columns); the inverse of ``gather``."""
        return whole if self.mesh is None else self._redistribute(whole, self._gathered, self._sharded)

    def _redistribute(self, local: Tensor, source: Sequence[Placement], target: Sequence[Placement]) -> Tensor:
        assert self.mesh is not None
        _, rows, columns = self._shape
        stride = (rows * columns, columns, 1)
        batch = DTensor.from_local(local.contiguous(), self.mesh, source, shape=self._shape, stride=stride)
        return batch.redistribute(placements=target).to_local()


def _prepend_dimension(placements: Sequence[Placement]) -> list[Placement]:
    """The same sharding for tensors with one more leading dimension."""
    shifted: list[Placement] = []
    for placement in placements:
        if isinstance(placement, _StridedShard):  # FSDP2 after tensor parallelism, both by rows
            shifted.append(_StridedShard(placement.dim + 1, split_factor=placement.split_factor))
        elif isinstance(placement, Shard):
            shifted.append(Shard(placement.dim + 1))
        else:
            shifted.append(placement)
    return shifted
