"""One network over several processes: which of its weights are cut, along which dimension, and who has which part.

The model knows nothing of it. Tensor parallelism (https://arxiv.org/abs/1909.08053) gives each process some of the
heads and some of the hidden channels; the products before them are cut by columns and those after them by rows, so that
a part of a block ends in one sum over the processes. FSDP2 (https://arxiv.org/abs/2304.11277) cuts what is left of each
weight among the processes that read different data, and puts a block together when it is its turn.
"""

from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.optim.gradient_clipping import to_local

DATA_PARALLEL, TENSOR_PARALLEL = "data_parallel", "tensor_parallel"
"""Dimensions of the mesh, by Lightning's names."""
IN_BLOCKS: Final[dict[str, type[ParallelStyle]]] = {
    "attention.query": ColwiseParallel,
    "attention.key": ColwiseParallel,
    "attention.value": ColwiseParallel,
    "attention.output": RowwiseParallel,
    "feed_forward.input": ColwiseParallel,
    "feed_forward.gate": ColwiseParallel,
    "feed_forward.output": RowwiseParallel,
}
"""How the matrices of a block are cut; those that a block does not have are passed over."""
OF_EACH_HEAD: Final = ("attention.query_norm", "attention.key_norm")
"""What every process has whole, and applies to its own heads alone."""


def validate_tensor_parallel(config: GPTConfig, size: int, precision: str, adapters: bool = False) -> None:
    """Refuse to cut what cannot be cut.

    Args:
        config: The architecture.
        size: Processes that share one copy of it.
        precision: The trainer's.
        adapters: Whether low-rank adapters are trained beside the weights.

    Raises:
        UserError: Heads or hidden channels cannot be dealt out to so many processes, or a switch needs all heads.
    """
    if size == 1:
        return
    if adapters:
        raise UserError("model.lora: adapters cannot be shared among tensor-parallel processes; choose fsdp2 or ddp")
    for name, number in (("n_head", config.n_head), ("n_kv_head", config.kv_heads), ("ffn_dim", config.ffn_width)):
        if number % size:
            raise UserError(
                f"tensor_parallel is {size}, but model.gpt.{name} is {number}, which {size} processes cannot share "
                f"evenly; choose a divisor of {number}, or another {name}"
            )
    if config.position == "alibi":
        raise UserError(
            "model.gpt.position is alibi, whose heads are not alike; a tensor-parallel process has only some"
        )
    if config.dropout:
        raise UserError(
            f"model.gpt.dropout is {config.dropout}; tensor-parallel processes draw alike, and would drop the same of "
            f"their heads: choose 0, or fsdp2"
        )
    if precision == "16-mixed" or precision.startswith("transformer-engine"):
        raise UserError(
            f"--trainer.precision {precision} cannot scale gradients that are cut by heads; bf16-mixed and 32-true work"
        )
    if config.attention is not None:
        raise UserError(
            f"model.gpt.attention is {config.attention}; how to share attention of your own among tensor-parallel "
            f"processes is not known: choose fsdp2 or ddp"
        )


def parallelize(net: GPT, mesh: DeviceMesh, precision: str) -> None:
    """Cut a network, in place; all processes have the same weights before.

    In ``bf16-mixed`` FSDP2 sends the weights of blocks in bfloat16, which is half as much; their gains and biases, too,
    are then rounded for the products. The stream, the embeddings and the head stay in float32, and so do the sums of
    all gradients. A sum is made after every micro-batch: whole gradients would need the memory that FSDP2 saves.

    Args:
        net: The network.
        mesh: Its dimensions are ``data_parallel`` and ``tensor_parallel``.
        precision: The trainer's.

    Raises:
        UserError: The heads cannot be dealt out.
    """
    if mesh[TENSOR_PARALLEL].size() > 1:
        validate_tensor_parallel(net.config, mesh[TENSOR_PARALLEL].size(), precision)
        _apply_tensor_parallel(net, mesh[TENSOR_PARALLEL])
    if mesh[DATA_PARALLEL].size() > 1:
        policy = MixedPrecisionPolicy()
        if precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in net.blocks:
            fully_shard(block, mesh=mesh[DATA_PARALLEL], mp_policy=policy)
        fully_shard(net, mesh=mesh[DATA_PARALLEL])
        for way_in in ("hidden_states", "apply_head", "logit_lens"):  # who writes or looks goes through these
            register_fsdp_forward_method(net, way_in)


@torch.no_grad()
def reduce_tp_gradients(net: GPT, mesh: DeviceMesh) -> None:
    """Bring all gradients, in place, to what a single process would have of each parameter's part.

    What is applied to heads has, on each process, the gradient of its own heads alone; and PyTorch leaves that of a
    table that is cut by rows whole.
    """
    for p in net.parameters():
        if isinstance(p, DTensor) and isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)
    if mesh[TENSOR_PARALLEL].size() == 1:
        return
    of_heads = [p for block in net.blocks for name in OF_EACH_HEAD for p in block.get_submodule(name).parameters()]
    parts = [to_local(p.grad) for p in of_heads if p.grad is not None]
    if parts:
        together = torch.cat(parts)  # one message instead of many
        dist.all_reduce(together, group=mesh[TENSOR_PARALLEL].get_group())
        torch._foreach_copy_(parts, torch.split(together, [len(part) for part in parts]))


def gather_heads(own: Tensor, dimension: int, mesh: DeviceMesh | None) -> Tensor:
    """Put together what each tensor-parallel process has of its own heads or units; all of them have to ask.

    Args:
        own: This process's, of any shape.
        dimension: That of heads or units.
        mesh: As for ``parallelize``; None if nothing is cut.
    """
    if mesh is None or mesh[TENSOR_PARALLEL].size() == 1:
        return own
    parts = [torch.empty_like(own) for _ in range(mesh[TENSOR_PARALLEL].size())]
    dist.all_gather(parts, own.contiguous(), group=mesh[TENSOR_PARALLEL].get_group())
    return torch.cat(parts, dimension)


def _apply_tensor_parallel(net: GPT, mesh: DeviceMesh) -> None:
    for block in net.blocks:
        own = {name for name, _ in block.named_modules()}
        plan: dict[str, ParallelStyle] = {name: style() for name, style in IN_BLOCKS.items() if name in own}
        # What comes in is told to be whole once, not by each matrix: so their gradients are added before they are sent.
        for part, others in (("attention", 4), ("feed_forward", 0)):
            layouts = (Replicate(), *[None] * others)
            plan[part] = PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
        parallelize_module(block, mesh, plan)
    for table in net.value_tables:
        parallelize_module(table, mesh, ColwiseParallel())
    tied = net.head.weight is net.embedding.weight
    parallelize_module(net.embedding, mesh, RowwiseParallel(input_layouts=Replicate()))
    # The sum over the processes may still be on its way, and a compiled block that is given such a tensor loses the
    # way back to it.
    net.embedding.register_forward_hook(lambda module, ids, out: out.clone())
    parallelize_module(net.head, mesh, ColwiseParallel(output_layouts=Replicate()))
    if tied:
        net.head.weight = net.embedding.weight
