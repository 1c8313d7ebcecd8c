"""Networks sharded as one rank of many, without the other ranks; the private part of torch that this needs."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from lit_gpt_scratch.distributed.fake_process_group import fake_mesh
from lit_gpt_scratch.distributed.parallelize import DATA_PARALLEL, TENSOR_PARALLEL, parallelize
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.local_shard import to_local

CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=32, n_kv_head=2)


def shapes(net: GPT) -> dict[str, tuple[int, ...]]:
    return {name: tuple(to_local(p).shape) for name, p in net.named_parameters()}


def test_shards_divide_rows_across_data_and_heads_across_tensor_parallel_ranks() -> None:
    with torch.device("meta"):
        net = GPT(CONFIG, 64, 16)
    with fake_mesh(4, 2) as mesh:
        parallelize(net, mesh, "bf16-mixed")
        assert mesh.size() == 8
    found = shapes(net)
    assert found["embedding.weight"] == (64 // 8, 32)  # tensor parallelism and FSDP2 both shard rows
    assert found["blocks.0.attention.output.weight"] == (32 // 4, 32 // 2)  # one of them rows, the other columns
    assert found["blocks.0.attention_norm.weight"] == (32 // 4,)
    assert not dist.is_initialized()


def test_a_real_process_group_is_not_replaced(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="already exists"), fake_mesh(2, 1):
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_the_group_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), fake_mesh(2, 1):
        raise ZeroDivisionError
    assert not dist.is_initialized()


def _shard_for_real(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    net = GPT(CONFIG, 63, 16)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=(DATA_PARALLEL, TENSOR_PARALLEL))
    parallelize(net, mesh, "bf16-mixed")
    torch.save(shapes(net), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_are_those_of_two_real_processes(tmp_path: Path) -> None:
    """With a vocabulary that two ranks cannot divide evenly."""
    mp.spawn(_shard_for_real, (str(tmp_path),), nprocs=2)
    with torch.device("meta"):
        net = GPT(CONFIG, 63, 16)
    with fake_mesh(2, 1) as mesh:
        parallelize(net, mesh, "bf16-mixed")
    real = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert shapes(net) == real[0]
    assert (real[0]["embedding.weight"], real[1]["embedding.weight"]) == ((32, 32), (31, 32))
