"""Build sharded networks as one rank of many, without the other ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

# Importing this private module registers the backend "fake"; tests/distributed/test_fake_process_group.py fails if it
# changes.
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_gpt_scratch.distributed.parallelize import build_mesh


@contextmanager
def fake_mesh(data_parallel: int, tensor_parallel: int, groups: int = 1) -> Iterator[DeviceMesh]:
    """Provide the device mesh of rank 0 in a process group whose other ranks do not exist.

    Collective operations return at once and leave their outputs unchanged, so the mesh is only suitable for networks on
    the meta device: they are sharded as in a real run, but cannot compute.

    Args:
        data_parallel: See ``build_mesh``.
        tensor_parallel: See ``build_mesh``.
        groups: See ``build_mesh``.

    Raises:
        RuntimeError: The process is already a rank of a process group.
    """
    if dist.is_initialized():
        raise RuntimeError("a process group already exists")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=data_parallel * tensor_parallel)
    try:
        yield build_mesh("cpu", data_parallel, tensor_parallel, groups)
    finally:
        dist.destroy_process_group()
