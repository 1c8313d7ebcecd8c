"""The part of a ``DTensor`` parameter, gradient or optimizer state that this process holds."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from lit_gpt_scratch.kernels.onednn_linear import linear


def to_local(tensor: Tensor) -> Tensor:
    """Return the local shard of a ``DTensor``, which shares its memory; any other tensor is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def linear_on_local_shard(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer without a bias to a tensor that each tensor-parallel process computes for its own heads.

    If the layer is split by columns, the gradient of ``x`` on each process includes only the heads of that process,
    whereas calling the layer would add an all-reduce for this gradient.

    Args:
        layer: The layer.
        x: Input of shape (..., in_features), the output of a module that is replicated across the processes.

    Returns:
        The output channels of this process, of shape (..., out_features / processes).
    """
    if isinstance(layer.weight, DTensor):
        return linear(x, to_local(layer.weight))
    out: Tensor = layer(x)
    return out


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
