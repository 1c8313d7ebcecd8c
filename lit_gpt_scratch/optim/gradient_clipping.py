"""Gradient clipping by norm and by value, with support for sharded gradients."""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement

from lit_gpt_scratch.model.local_shard import to_local
from lit_gpt_scratch.optim.dtensor import sharding_of


def gradients_of(module: nn.Module) -> list[Tensor]:
    """Return the gradients of a module's parameters, skipping those that are None."""
    return [p.grad for p in module.parameters() if p.grad is not None]


def total_grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Compute the total Euclidean norm of all gradients, across all shards; the result is the same on all processes.

    Args:
        gradients: Gradients of any shape and sharding.

    Returns:
        A scalar in the dtype of the gradients, or 0 if there are no gradients.
    """
    by_sharding: dict[tuple[DeviceMesh | None, tuple[Placement, ...]], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_sharding[sharding_of(gradient)].append(to_local(gradient))
    norms = []
    for (mesh, placements), shards in by_sharding.items():
        norm = torch.nn.utils.get_total_norm(shards)
        for dimension, placement in enumerate(placements):
            if mesh is not None and not placement.is_replicate():
                square = norm.square()
                dist.all_reduce(square, group=mesh.get_group(dimension))
                norm = square.sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms)


def clip_grad_norm(gradients: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients in place so that their total norm is at most ``max_norm`` (https://arxiv.org/abs/1211.5063).

    Returns:
        The total norm before clipping.
    """
    norm = total_grad_norm(gradients)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if factor.device.type != "cpu" or not factor >= 1:  # reading the factor would synchronize with an accelerator
        torch._foreach_mul_([to_local(gradient) for gradient in gradients], factor)
    return norm


def clip_grad_value(gradients: Sequence[Tensor], max_value: float) -> None:
    """Clamp all elements of the gradients in place to the range ``[-max_value, max_value]``."""
    shards = [to_local(gradient) for gradient in gradients]
    torch._foreach_clamp_min_(shards, -max_value)
    torch._foreach_clamp_max_(shards, max_value)
