"""What the processes of a run agree on."""

import torch
import torch.distributed as dist


class HostReducer:
    """Small numbers that all ranks of a run settle between two steps, without waiting for an accelerator.

    To be built on all ranks at once, when their process group stands.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # NCCL would make the host wait for the device at every step.
        self._group = dist.new_group(backend="gloo") if several else None

    def max(self, value: int) -> int:
        """The greatest of all ranks' values; every rank has to ask."""
        if self._group is None:
            return value
        values = torch.tensor(int(value))
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return int(values.item())
