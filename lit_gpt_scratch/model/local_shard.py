"""The part of a ``DTensor`` parameter, gradient or optimizer state that this process holds."""

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard


def to_local(tensor: Tensor) -> Tensor:
    """Return the local shard of a ``DTensor``, which shares its memory; any other tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_slices(tensor: Tensor) -> list[slice]:
    """Return the slice of each dimension that this process holds; of a tensor that is not sharded, the whole dimension.

    Where two mesh dimensions shard the same dimension of the tensor, as FSDP2 on top of tensor parallelism does, the
    last mesh dimension shards it first.
    """
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        sharded = zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True)
        for placement, n_shards, index in reversed(list(sharded)):
            if isinstance(placement, Shard | _StridedShard):
                start, stop = bounds[placement.dim]
                size = -(-(stop - start) // n_shards)  # the last shards may be smaller, or empty
                first = min(start + index * size, stop)
                bounds[placement.dim] = first, min(first + size, stop)
    return [slice(start, stop) for start, stop in bounds]
