"""Tensor parallelism and FSDP2 for a GPT: which weights are sharded, and along which dimension.

Modules declare how tensor parallelism splits them (``model.module_metadata``); this file applies it. Tensor parallelism
(https://arxiv.org/abs/1909.08053) gives each process some of the heads and some of the hidden channels: the matrices
before them are split by columns and those after them by rows, so that each residual branch needs one all-reduce. FSDP2
(https://arxiv.org/abs/2304.11277) shards what remains of each weight over the data-parallel processes, and gathers one
block at a time.
"""

import inspect
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
from lit_gpt_scratch.optim.dtensor import to_local

DATA_PARALLEL, TENSOR_PARALLEL = "data_parallel", "tensor_parallel"
"""Dimensions of the device mesh, by Lightning's names."""
REPLICATED: Final = "replicated"
STYLES: Final[dict[str, Callable[[], ParallelStyle]]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding": lambda: RowwiseParallel(input_layouts=Replicate()),
}
"""Styles of a module's ``tensor_parallel_plan``, except ``replicated``."""


def validate_tensor_parallel(config: GPTConfig, size: int, precision: str, adapters: bool = False) -> None:
    """Check that a model can be split over tensor-parallel processes.

    Args:
        config: The architecture.
        size: Tensor-parallel processes.
        precision: The trainer's.
        adapters: Whether LoRA adapters are trained.

    Raises:
        UserError: Heads or hidden channels are not divisible by the size, or a setting does not support it.
    """
    if size == 1:
        return
    if adapters:
        raise UserError("model.lora: adapters do not support tensor parallelism; choose fsdp2 or ddp")
    for name, number in (("n_head", config.n_head), ("n_kv_head", config.kv_heads), ("ffn_dim", config.ffn_width)):
        if number % size:
            raise UserError(
                f"tensor_parallel is {size}, but model.gpt.{name} is {number}, which is not divisible by it; choose a "
                f"divisor of {number}, or another {name}"
            )
    if config.position == "alibi":
        raise UserError(
            "model.gpt.position is alibi, whose slopes differ by head; tensor parallelism does not support it: choose "
            "another position, or fsdp2 or ddp"
        )
    if config.dropout:
        raise UserError(
            f"model.gpt.dropout is {config.dropout}; tensor-parallel processes share their random state, and would "
            f"drop the same elements of different heads: choose 0, or fsdp2"
        )
    if precision == "16-mixed" or precision.startswith("transformer-engine"):
        raise UserError(
            f"--trainer.precision {precision} cannot scale gradients that are sharded by tensor parallelism; choose "
            f"bf16-mixed or 32-true"
        )
    if config.attention is not None:
        raise UserError(
            f"model.gpt.attention is {config.attention}; tensor parallelism does not support custom attention: choose "
            f"fsdp2 or ddp"
        )


def parallelize(net: GPT, mesh: DeviceMesh, precision: str) -> None:
    """Shard a network in place, which has the same weights on all processes.

    In ``bf16-mixed`` FSDP2 gathers the weights of blocks in bfloat16, which halves the traffic; gains and biases are
    then rounded, too. The residual stream, the embeddings and the head stay in float32, as do the sums of all
    gradients, which are reduced after every micro-batch: unsharded ones would need the memory that FSDP2 saves.

    Args:
        net: The network.
        mesh: Its dimensions are ``data_parallel`` and ``tensor_parallel``.
        precision: The trainer's.

    Raises:
        UserError: The network cannot be split over the tensor-parallel processes.
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
        for method in ("hidden_states", "apply_head", "logit_lens"):  # called without forward()
            register_fsdp_forward_method(net, method)


@torch.no_grad()
def reduce_tp_gradients(net: GPT, mesh: DeviceMesh) -> None:
    """Complete the gradients of tensor parallelism in place, so that each equals that of a single process.

    A replicated module that is applied to heads has, on each process, the gradient of its own heads only; and PyTorch
    leaves the gradient of a row-sharded embedding unsharded.
    """
    for p in net.parameters():
        if isinstance(p, DTensor) and isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)
    if mesh[TENSOR_PARALLEL].size() == 1:
        return
    gradients = [
        to_local(p.grad)
        for module, name, style in _declared_styles(net)
        if style == REPLICATED
        for p in module.get_submodule(name).parameters()
        if p.grad is not None
    ]
    if gradients:
        flat = torch.cat(gradients)  # one message instead of many
        dist.all_reduce(flat, group=mesh[TENSOR_PARALLEL].get_group())
        torch._foreach_copy_(gradients, torch.split(flat, [len(gradient) for gradient in gradients]))


def gather_heads(local: Tensor, dimension: int, mesh: DeviceMesh | None) -> Tensor:
    """Concatenate the heads or hidden channels of all tensor-parallel processes; all of them have to call this.

    Args:
        local: This process's heads or channels; a tensor of any shape.
        dimension: Dimension of heads or channels.
        mesh: As for ``parallelize``; None without sharding.
    """
    if mesh is None or mesh[TENSOR_PARALLEL].size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(mesh[TENSOR_PARALLEL].size())]
    dist.all_gather(parts, local.contiguous(), group=mesh[TENSOR_PARALLEL].get_group())
    return torch.cat(parts, dimension)


def _declared_styles(net: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """The tensor-parallel plans of all modules: (module, name of its child, style)."""
    for module in net.modules():
        for pattern, style in getattr(module, "tensor_parallel_plan", {}).items():
            for name, _ in module.named_modules():
                if fnmatch(name, pattern):
                    yield module, name, style


def _apply_tensor_parallel(net: GPT, mesh: DeviceMesh) -> None:
    tied = net.head.weight is net.embedding.weight
    for module, name, style in list(_declared_styles(net)):
        if style != REPLICATED:
            parallelize_module(module, mesh, {name: STYLES[style]()})
    for module in net.blocks.modules():
        if hasattr(module, "tensor_parallel_plan"):
            # The input becomes a DTensor here and not in each matrix, whose gradients are then added before the
            # all-reduce.
            others = len(inspect.signature(module.forward).parameters) - 1
            layouts = (Replicate(), *[None] * others)
            parallelize_module(module, mesh, PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts))
    # The embedding's all-reduce may still be pending, and a compiled block that receives such a tensor loses its graph.
    net.embedding.register_forward_hook(lambda module, ids, out: out.clone())
    if tied:
        net.head.weight = net.embedding.weight
