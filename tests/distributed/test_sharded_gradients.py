"""Logits and gradients of sharded networks, in real processes, against a network in a single process."""

import os
import socket
from dataclasses import replace
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist

from lit_gpt_scratch.distributed.parallelize import build_mesh, parallelize, reduce_tp_gradients
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.local_shard import to_local
from tests.conftest import randomised
from tests.distributed.test_sharded_construction import MESHES, part_of
from tests.end_to_end import forked

CONFIG = GPTConfig(n_layer=2, n_head=4, n_embd=32)
CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "default": {},
    "latent attention": {"attention": "latent"},
    "multi-token prediction": {"multi_token_depth": 2, "tied_embeddings": True},
    "latent attention with a query rank": {
        "attention": "latent", "latent_query_rank": 10, "latent_value_dim": 12, "bias": True,
    },
}  # fmt: skip
LAYOUTS: Final = {"tp": (1, 2, 1), "fsdp2": (2, 1, 1), "fsdp2_tp": MESHES["fsdp2_tp"]}


def compare(rank: str, world: str, port: str, layout: str) -> None:
    """Compare this process's part of a network with a network that is not sharded."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=int(rank), world_size=int(world))
    mesh = build_mesh("cpu", *LAYOUTS[layout])
    for name, changes in CONFIGS.items():
        whole, sharded = (randomised(replace(CONFIG, **changes)).double() for _ in range(2))
        parallelize(sharded, mesh, "64-true")
        ids, target = torch.randint(61, (2, 24)), torch.randn(2, 24, 61, dtype=torch.float64)
        for net in (whole, sharded):
            states = net.hidden_states_by_depth(ids)
            outputs = [net.finalize_output(net.head(x)) for x in states]  # as the loss does
            sum((out * target[:, : out.size(1)]).sum() for out in outputs).backward()
        reduce_tp_gradients(sharded, mesh)
        with torch.no_grad():
            torch.testing.assert_close(sharded(ids), whole(ids), atol=1e-10, rtol=1e-10)
        for (parameter, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True):
            assert p.grad is not None, (name, parameter)
            assert q.grad is not None
            scale = q.grad.abs().max()
            found, expected = to_local(p.grad) / scale, part_of(q.grad, p) / scale
            torch.testing.assert_close(
                found, expected, atol=1e-10, rtol=1e-10, msg=lambda m, n=(name, parameter): f"{n}: {m}"
            )
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_those_of_one_process(layout: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, tensor, _ = LAYOUTS[layout]
    script = f"import sys\nfrom {__name__} import compare\ncompare(*sys.argv[1:])"
    arguments = [[f"{rank}", f"{data * tensor}", f"{port}", layout] for rank in range(data * tensor)]
    for done in forked.python_processes(script, arguments):
        assert done.code == 0, done.err
