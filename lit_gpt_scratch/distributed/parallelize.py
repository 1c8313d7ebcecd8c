"""Apply tensor parallelism and FSDP2 to a GPT.

Modules declare how tensor parallelism splits them (``model.module_metadata``), and this module applies these plans.

Tensor parallelism (https://arxiv.org/abs/1909.08053) assigns a subset of the heads and hidden channels to each process.
Input projections are split by columns and output projections by rows, so that each residual branch requires only one
all-reduce. FSDP2 (https://arxiv.org/abs/2304.11277) shards the remaining part of each weight across data-parallel
processes, and gathers one block at a time. Hybrid sharding (HSDP) shards it only across the processes of a group, such
as those of a machine, and replicates it across groups, so that only gradients are sent between the groups.
"""

import inspect
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from typing_extensions import override

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.local_shard import shard_slices, to_local
from lit_gpt_scratch.model.moe import Experts

DATA_PARALLEL, TENSOR_PARALLEL = "data_parallel", "tensor_parallel"
"""Dimension names of the device mesh, as in Lightning."""
REPLICATE, SHARD = "replicate", "shard"
"""Names of the two dimensions into which hybrid sharding divides the data-parallel dimension."""
REPLICATED: Final = "replicated"


class ExpertParallel(ParallelStyle):
    """Parallel style of ``model.moe.Experts``: each process holds some of the experts, and applies them to all tokens.

    The outputs are summed over the processes, and so are the gradients of the tokens and of the gates.
    """

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Experts)
        for layer in (module.input, module.gate, module.output):
            for name, parameter in layer.named_parameters():
                layer.register_parameter(name, nn.Parameter(distribute_tensor(parameter, device_mesh, [Shard(0)])))
        module.first = shard_slices(module.input.weight)[0].start

        def sum_gradients(_: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            x, experts, gates = inputs
            x, gates = (
                DTensor.from_local(each, device_mesh, [Replicate()]).to_local(grad_placements=[Partial()])
                for each in (x, gates)
            )
            return x, experts, gates

        def sum_outputs(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            partial = DTensor.from_local(output, device_mesh, [Partial()])
            return partial.redistribute(placements=[Replicate()]).to_local()

        module.register_forward_pre_hook(sum_gradients)
        module.register_forward_hook(sum_outputs)
        return module


class HeadwiseParallel(ParallelStyle):
    """Parallel style that splits dimension 0 of all parameters of a module, which uses only its local elements."""

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(distribute_tensor(parameter, device_mesh, [Shard(0)])))
        return module


STYLES: Final[dict[str, Callable[[], ParallelStyle]]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding": lambda: RowwiseParallel(input_layouts=Replicate()),
    "experts": ExpertParallel,
    "headwise": HeadwiseParallel,
}
"""Parallel styles, other than ``replicated``, that a module's ``tensor_parallel_plan`` can use."""


def validate_tensor_parallel(config: GPTConfig, size: int, precision: str, adapters: bool = False) -> None:
    """Check that a model can be split across tensor-parallel processes.

    Args:
        config: The model config.
        size: Number of tensor-parallel processes.
        precision: The Trainer's precision.
        adapters: Whether LoRA adapters are trained.

    Raises:
        UserError: The number of heads or hidden channels is not divisible by ``size``, or a setting is not supported.
    """
    if size == 1:
        return
    if adapters:
        raise UserError("model.lora is not supported with tensor parallelism; choose fsdp2 or ddp")
    divided = {"n_head": config.n_head, "n_kv_head": config.kv_heads, "ffn_dim": config.ffn_width}
    if config.feed_forward == "moe":
        del divided["ffn_dim"]
        divided |= {
            "n_experts": config.n_experts,
            "n_shared_experts * ffn_dim": config.n_shared_experts * config.ffn_width,
        }
    for name, number in divided.items():
        if number % size:
            raise UserError(
                f"tensor_parallel is {size}, but model.gpt.{name} is {number}, which is not divisible by {size}; "
                f"choose a divisor of {number}, or another {name}"
            )
    if config.position == "alibi":
        raise UserError(
            "model.gpt.position is alibi, which is not supported with tensor parallelism, because its slopes differ "
            "between heads; choose another position, or use fsdp2 or ddp"
        )
    if config.dropout:
        raise UserError(
            f"model.gpt.dropout is {config.dropout}, but tensor-parallel processes share their random state and would "
            f"drop the same elements of different heads; set it to 0, or use fsdp2"
        )
    if precision == "16-mixed" or precision.startswith("transformer-engine"):
        raise UserError(
            f"--trainer.precision {precision} is not supported with tensor parallelism, because it "
            f"does not support sharded gradients; choose bf16-mixed or 32-true"
        )
    if config.qk_norm_joint:
        raise UserError(
            "model.gpt.qk_norm_joint is true, which is not supported with tensor parallelism, because it normalizes "
            "the heads of all processes together; use fsdp2 or ddp"
        )
    for field, name in config.custom_classes.items():
        raise UserError(
            f"model.gpt.{field} is {name}, but custom classes are not supported with tensor parallelism; choose fsdp2 "
            f"or ddp"
        )


def supports_tensor_parallel(config: GPTConfig, size: int, precision: str) -> bool:
    """Return whether ``validate_tensor_parallel`` raises no error."""
    try:
        validate_tensor_parallel(config, size, precision)
    except UserError:
        return False
    return True


def build_mesh(device_type: str, data_parallel: int, tensor_parallel: int, groups: int = 1) -> DeviceMesh:
    """Build the device mesh for ``parallelize``; all processes must call this function.

    Its dimensions are ``data_parallel`` (with several groups, ``replicate`` and ``shard``) and ``tensor_parallel``.

    Args:
        device_type: Such as ``cuda``.
        data_parallel: Number of processes that read different data.
        tensor_parallel: Number of processes that share one replica.
        groups: Number of groups that each hold all weights (HSDP), a divisor of ``data_parallel``.
    """
    if groups == 1:
        return init_device_mesh(
            device_type, (data_parallel, tensor_parallel), mesh_dim_names=(DATA_PARALLEL, TENSOR_PARALLEL)
        )
    shape, names = (groups, data_parallel // groups, tensor_parallel), (REPLICATE, SHARD, TENSOR_PARALLEL)
    return init_device_mesh(device_type, shape, mesh_dim_names=names)


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the dimension of the device mesh across which FSDP2 shards weights."""
    return mesh[SHARD] if _is_hybrid(mesh) else mesh[DATA_PARALLEL]


def count_shards(mesh: DeviceMesh | None) -> int:
    """Return the number of processes across which ``parallelize`` shards a network; 1 without a device mesh."""
    if mesh is None:
        return 1
    return mesh.size() // mesh[REPLICATE].size() if _is_hybrid(mesh) else mesh.size()


def _is_hybrid(mesh: DeviceMesh) -> bool:
    return REPLICATE in (mesh.mesh_dim_names or ())


def parallelize(net: GPT, mesh: DeviceMesh, precision: str, cpu_offload: bool = False) -> None:
    """Shard a network in place; it is on the meta device, or its weights are the same on all processes.

    With ``bf16-mixed``, FSDP2 gathers the weights of the blocks in bfloat16, which halves the communication volume but
    also rounds gains and biases. The residual stream, the embeddings and the head stay in float32. Gradients are
    reduced in float32 after each micro-batch, because unsharded gradients would take up the memory that FSDP2 saves.

    Args:
        net: The network.
        mesh: Device mesh; see ``build_mesh``.
        precision: The Trainer's precision.
        cpu_offload: Whether shards of weights and gradients stay in the memory of the CPU; FSDP2 copies the weights of
            a block to the accelerator when it gathers them. The shards must then be allocated on the CPU.

    Raises:
        UserError: The network cannot be split across the tensor-parallel processes.
    """
    if mesh[TENSOR_PARALLEL].size() > 1:
        validate_tensor_parallel(net.config, mesh[TENSOR_PARALLEL].size(), precision)
        _apply_tensor_parallel(net, mesh[TENSOR_PARALLEL])
    data_mesh = mesh[REPLICATE, SHARD] if _is_hybrid(mesh) else mesh[DATA_PARALLEL]
    if data_mesh.size() > 1 or cpu_offload:
        policy = MixedPrecisionPolicy()
        if precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
        shard_dimension = partial(_shard_dimension, n_shards=fsdp_mesh(mesh).size())
        for block in net.all_blocks:
            fully_shard(
                block,
                mesh=data_mesh,
                mp_policy=policy,
                offload_policy=offload,
                shard_placement_fn=shard_dimension,
            )
        # By default, weights outside the blocks stay gathered until the backward pass, so the loss can use the head.
        fully_shard(net, mesh=data_mesh, offload_policy=offload)
        # Methods that are called without forward().
        for method in ("hidden_states", "hidden_states_by_depth", "apply_head", "logit_lens"):
            register_fsdp_forward_method(net, method)


def _shard_dimension(parameter: nn.Parameter, n_shards: int) -> Shard | None:
    """Return the dimension along which FSDP2 shards a parameter, if it is not the first one.

    Experts are sharded within each expert if their number is not divisible, because FSDP2 would pad them.
    """
    sizes = to_local(parameter).shape
    if len(sizes) < 3 or sizes[0] % n_shards == 0:
        return None
    return next((Shard(dim) for dim, size in enumerate(sizes) if size % n_shards == 0), None)


@torch.no_grad()
def reduce_tp_gradients(net: GPT, mesh: DeviceMesh) -> None:
    """Complete tensor-parallel gradients in place, so that they equal the gradients of a single process.

    If a replicated module is applied to individual heads, such as the norm of the queries, or individual heads use its
    output, such as the latents of latent attention, its gradient on each process includes only the heads of that
    process, so the gradient is summed across processes. PyTorch leaves the gradient of a row-sharded embedding
    unsharded, so this function shards it like the weight.

    Args:
        net: The network, after its backward pass.
        mesh: See ``parallelize``.
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
        flat = torch.cat([gradient.flatten() for gradient in gradients])  # one all-reduce instead of one per gradient
        dist.all_reduce(flat, group=mesh[TENSOR_PARALLEL].get_group())
        for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def gather_heads(local: Tensor, dimension: int, mesh: DeviceMesh | None) -> Tensor:
    """Concatenate the heads or hidden channels of all tensor-parallel processes, which must all call this function.

    Args:
        local: Tensor of any shape with the heads or channels of this process.
        dimension: Dimension of the heads or channels.
        mesh: See ``parallelize``, or None if the network is not sharded.
    """
    if mesh is None or mesh[TENSOR_PARALLEL].size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(mesh[TENSOR_PARALLEL].size())]
    dist.all_gather(parts, local.contiguous(), group=mesh[TENSOR_PARALLEL].get_group())
    return torch.cat(parts, dimension)


def _declared_styles(net: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Iterate over the tensor-parallel plans of all modules as (module, child name, style)."""
    for module in net.modules():
        for pattern, style in getattr(module, "tensor_parallel_plan", {}).items():
            for name, _ in module.named_modules():
                if fnmatch(name, pattern):
                    yield module, name, style


def _use_local_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Convert the input of a replicated module; its gradient includes only the heads of this process."""
    x, *others = inputs
    return (x.to_local(grad_placements=[Partial()]) if isinstance(x, DTensor) else x, *others)


def _apply_tensor_parallel(net: GPT, mesh: DeviceMesh) -> None:
    tied = net.head.weight is net.embedding.weight
    for module, name, style in list(_declared_styles(net)):
        if style != REPLICATED:
            parallelize_module(module, mesh, {name: STYLES[style]()})
        else:
            module.get_submodule(name).register_forward_pre_hook(_use_local_input)
    for module in net.modules():
        if module is not net and "colwise" in getattr(module, "tensor_parallel_plan", {}).values():
            # Convert the input to a DTensor once per module and not once per matrix, so that the gradients of the
            # matrices are added before the all-reduce.
            others = len(inspect.signature(module.forward).parameters) - 1
            layouts = (Replicate(), *[None] * others)
            parallelize_module(module, mesh, PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts))
    # The embedding's all-reduce may still be pending, and a compiled block that receives such a tensor would break its
    # autograd graph.
    net.embedding.register_forward_hook(lambda module, ids, out: out.clone())
    if tied:
        net.head.weight = net.embedding.weight
