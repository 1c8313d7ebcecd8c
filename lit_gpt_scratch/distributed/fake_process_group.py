"""Build sharded networks as one rank of many, without the other ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Importing this private module registers the backend "fake". It is the same in torch 2.11 to 2.13;
# tests/distributed/test_fake_process_group.py fails if it changes.
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_gpt_scratch.distributed.parallelize import DATA_PARALLEL, TENSOR_PARALLEL


@contextmanager
def fake_mesh(data_parallel: int, tensor_parallel: int) -> Iterator[DeviceMesh]:
    """Provide the device mesh of rank 0 in a process group whose other ranks do not exist.

    Collective operations return at once and leave their outputs unchanged, so the mesh is only suitable for networks on
    the meta device: they are sharded as in a real run, but cannot compute.

    Args:
        data_parallel: Number of replicas, across which FSDP2 shards the weights.
        tensor_parallel: Number of ranks that share a replica.

    Raises:
        RuntimeError: The process is already a rank of a process group.
    """
    if dist.is_initialized():
        raise RuntimeError("a process group already exists")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=data_parallel * tensor_parallel)
    try:
        yield init_device_mesh("cpu", (data_parallel, tensor_parallel), mesh_dim_names=(DATA_PARALLEL, TENSOR_PARALLEL))
    finally:
        dist.destroy_process_group()
