"""The part of a ``DTensor`` parameter, gradient or optimizer state that this process holds."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard


def to_local(tensor: Tensor) -> Tensor:
    """Return the local shard of a ``DTensor``, which shares its memory; any other tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def device_of(parameter: Tensor) -> torch.device:
    """Return the device on which a parameter is used. With CPU offload, its shard is stored on the CPU nevertheless."""
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != "cpu":
        return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())
    return parameter.device


def is_offloaded(parameter: Tensor) -> bool:
    """Return whether a parameter is a shard that is stored on the CPU, but used on an accelerator."""
    return isinstance(parameter, DTensor) and to_local(parameter).device.type != parameter.device_mesh.device_type


def shard_slices(tensor: Tensor) -> list[slice]:
    """Return the slice of each dimension that this process holds; of a tensor that is not sharded, the whole dimension.

    Where FSDP2 shards a dimension of the tensor that tensor parallelism also shards (``_StridedShard``), the last mesh
    dimension shards it first, contrary to the order of other placements.
    """
    bounds = [(0, size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None
        sharded = zip(tensor.placements, tensor.device_mesh.shape, coordinate, strict=True)
        for placement, n_shards, index in reversed(list(sharded)):
            if isinstance(placement, Shard | _StridedShard):
                is_first = bounds[placement.dim] == (0, tensor.shape[placement.dim])
                assert is_first or n_shards == 1 or isinstance(placement, _StridedShard), "not the order of FSDP2"
                start, stop = bounds[placement.dim]
                size = -(-(stop - start) // n_shards)  # the last shards may be smaller, or empty
                first = min(start + index * size, stop)
                bounds[placement.dim] = first, min(first + size, stop)
    return [slice(start, stop) for start, stop in bounds]
