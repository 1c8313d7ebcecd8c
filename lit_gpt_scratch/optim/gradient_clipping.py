"""Parameters that are cut among processes: the part that this one has, whole matrices, and the norm of all parts.

A ``DTensor`` says how it is cut. What is done to each number by itself is done to this process's part of it, without a
word to the others; that is also a good deal faster than through the ``DTensor``.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def to_local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; all of it where it is not cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharding_of(tensor: Tensor) -> tuple[DeviceMesh | None, tuple[Placement, ...]]:
    """Among whom it is cut, and how; None, and no way, where it is not."""
    return (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else (None, ())


def total_grad_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of tensors that may be cut, over all their parts; all processes get the same.

    Args:
        tensors: Of any shapes and cuts.

    Returns:
        A scalar of the tensors' type; 0 for no tensors.
    """
    alike: dict[tuple[DeviceMesh | None, tuple[Placement, ...]], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        alike[sharding_of(tensor)].append(to_local(tensor))
    norms = []
    for (mesh, placements), parts in alike.items():
        norm = torch.nn.utils.get_total_norm(parts)
        for dimension, placement in enumerate(placements):
            if mesh is not None and not placement.is_replicate():
                square = norm.square()
                dist.all_reduce(square, group=mesh.get_group(dimension))
                norm = square.sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def gradients_of(module: nn.Module) -> list[Tensor]:
    """Those that there are, of a module's parameters."""
    return [p.grad for p in module.parameters() if p.grad is not None]


def clip_grad_norm(gradients: Sequence[Tensor], most: float) -> Tensor:
    """Scale gradients, in place, to a norm of at most so much, all together (https://arxiv.org/abs/1211.5063).

    Returns:
        The norm that they had.
    """
    norm = total_grad_norm(gradients)
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    if factor.device.type != "cpu" or not factor >= 1:  # to ask an accelerator would be to wait for it
        torch._foreach_mul_([to_local(gradient) for gradient in gradients], factor)
    return norm


def clip_grad_value(gradients: Sequence[Tensor], most: float) -> None:
    """Bring every number of the gradients, in place, to between ``-most`` and ``most``."""
    parts = [to_local(gradient) for gradient in gradients]
    torch._foreach_clamp_min_(parts, -most)
    torch._foreach_clamp_max_(parts, most)


class BatchedMatrices:
    """N matrices of one shape that are cut alike, and the processes that have their parts.

    Args:
        like: One of the parameters that they belong to, (rows, columns).
        count: N.
        everywhere: Put all of them together on every process, instead of dealing them out.
    """

    def __init__(self, like: Tensor, count: int, everywhere: bool = False) -> None:
        self.mesh = like.device_mesh if isinstance(like, DTensor) else None
        if isinstance(like, DTensor):
            self._shape = torch.Size((count, *like.shape))
            self._cut = _shift_placements(like.placements)
            self._dealt = [Replicate() if everywhere else Shard(0)] * like.device_mesh.ndim

    def whole(self, parts: Tensor) -> Tensor:
        """(N, part of the rows, part of the columns) -> (n, rows, columns), this process's share of whole ones."""
        return parts if self.mesh is None else self._move(parts, self._cut, self._dealt)

    def parts(self, whole: Tensor) -> Tensor:
        """The way back."""
        return whole if self.mesh is None else self._move(whole, self._dealt, self._cut)

    def _move(self, local: Tensor, source: Sequence[Placement], target: Sequence[Placement]) -> Tensor:
        assert self.mesh is not None
        _, rows, columns = self._shape
        stride = (rows * columns, columns, 1)
        moved = DTensor.from_local(local.contiguous(), self.mesh, source, shape=self._shape, stride=stride)
        return moved.redistribute(placements=target).to_local()


def _shift_placements(placements: Sequence[Placement]) -> list[Placement]:
    """The same cuts, of tensors with one more dimension before the others."""
    moved: list[Placement] = []
    for placement in placements:
        if isinstance(placement, _StridedShard):  # FSDP2 after tensor parallelism, both by rows
            moved.append(_StridedShard(placement.dim + 1, split_factor=placement.split_factor))
        elif isinstance(placement, Shard):
            moved.append(Shard(placement.dim + 1))
        else:
            moved.append(placement)
    return moved
