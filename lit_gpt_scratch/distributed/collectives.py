"""Collectives on the host: small decisions that all ranks must share."""

import torch
import torch.distributed as dist


class HostReducer:
    """All-reduce of small integers over all ranks, through gloo, without synchronising the accelerator.

    Create it on all ranks at the same point, after the process group is initialised.
    """

    def __init__(self) -> None:
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # With NCCL the host would wait for the device at every step.
        self._group = dist.new_group(backend="gloo") if distributed else None

    def max(self, value: int) -> int:
        """Maximum of the values of all ranks; every rank must call it."""
        if self._group is None:
            return value
        values = torch.tensor(int(value))
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return int(values.item())
