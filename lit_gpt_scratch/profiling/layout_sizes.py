"""Memory of one rank on a machine that is not here: the real layout on the meta device, and simulated activations.

The network is built with one and with two blocks. All blocks are equal, so every size is a linear function of the
number of blocks, and a network of any depth takes the same time.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, Literal, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer

from lit_gpt_scratch.distributed.fake_process_group import fake_mesh
from lit_gpt_scratch.distributed.parallelize import fsdp_mesh, parallelize, supports_tensor_parallel
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import MAX_LOGITS_MB_ACCELERATOR, positions_per_chunk
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt_scratch.model.local_shard import to_local
from lit_gpt_scratch.optim import OptimizerRecipe
from lit_gpt_scratch.profiling.accelerators import Machine
from lit_gpt_scratch.profiling.flops_and_memory import (
    activation_bytes,
    build_on_meta,
    count_parameters_by_part,
    state_bytes_by_part,
    training_flops_per_token,
)

StrategyName = Literal["single", "ddp", "fsdp2", "hsdp", "tp", "fsdp2_tp"]
SHARDED: Final = ("fsdp2", "hsdp", "tp", "fsdp2_tp")
"""Names of the strategies that shard weights."""
WEIGHT_DTYPES: Final = {
    "32-true": torch.float32, "bf16-mixed": torch.float32, "16-mixed": torch.float32, "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}  # fmt: skip
"""Dtype in which the weights are stored, keyed by the Trainer's precision."""


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that determines the memory and the speed of a training run.

    Attributes:
        config: The architecture.
        vocab_size: Number of token ids.
        block_size: Number of tokens per row.
        batch_size: Number of rows per micro-batch and data-parallel rank.
        accumulate: Number of micro-batches per optimizer step.
        precision: The Trainer's precision, a key of ``WEIGHT_DTYPES``.
        strategy: Name of the strategy.
        tensor_parallel: Number of ranks that share a replica.
        checkpointing: What each block stores for the backward pass.
        optimizer: The optimizer.
        averaged: Whether there is a moving average of the weights.
        clips: Whether gradients are clipped by their norm.
        machine: The machine.
        groups: Number of groups that each hold all weights, for ``hsdp``.
        cpu_offload: Whether weights, gradients and optimizer state are in the memory of the host.
        max_logits_mb: Size of the logits in MB above which the loss is computed in chunks.
    """

    config: GPTConfig
    vocab_size: int
    block_size: int
    batch_size: int
    accumulate: int
    precision: str
    strategy: StrategyName
    tensor_parallel: int
    checkpointing: ActivationCheckpointing
    optimizer: OptimizerRecipe
    averaged: bool
    clips: bool
    machine: Machine
    groups: int = 1
    cpu_offload: bool = False
    max_logits_mb: float = MAX_LOGITS_MB_ACCELERATOR

    @property
    def data_parallel(self) -> int:
        """Number of data-parallel ranks."""
        return self.machine.devices // self.tensor_parallel

    @property
    def is_fully_sharded(self) -> bool:
        """Whether FSDP2 shards the weights across data-parallel ranks."""
        return self.strategy in ("fsdp2", "hsdp", "fsdp2_tp") and (self.n_shards > 1 or self.cpu_offload)

    @property
    def n_shards(self) -> int:
        """Number of data-parallel ranks across which FSDP2 shards the weights, if it does."""
        return self.data_parallel // self.groups

    @property
    def tokens_per_rank(self) -> int:
        """Number of tokens per micro-batch and data-parallel rank."""
        return self.batch_size * self.block_size

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens per optimizer step of all ranks."""
        return self.tokens_per_rank * self.data_parallel * self.accumulate

    @property
    def weight_bytes(self) -> int:
        """Bytes per stored weight, and per weight in gradients, optimizer state and averages."""
        return WEIGHT_DTYPES[self.precision].itemsize

    @property
    def loss_chunk_size(self) -> int | None:
        """Number of positions per chunk of the loss; None if all logits are computed at once."""
        size = positions_per_chunk(self.vocab_size, self.max_logits_mb)
        is_whole = size >= self.tokens_per_rank or self.tensor_parallel > 1 or self.precision == "16-mixed"
        return None if is_whole else size

    @property
    def bf16_state(self) -> bool:
        """Whether the optimizer stores its state in bfloat16."""
        return getattr(self.optimizer, "bf16_state", False)

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of the inputs and outputs of matmuls."""
        return 4 if self.precision == "32-true" else 2


Change = tuple[dict[str, str], TrainingSetup]
"""Values of flags, keyed by flag, and the setup that they result in."""


class LayoutSizes(NamedTuple):
    """Sizes of a sharded network and its optimizer on rank 0, which has the largest shards.

    Attributes:
        parameters: Number of parameters of the whole network, keyed by part.
        flops_per_token: Model FLOPs per token of the whole network; see ``training_flops_per_token``.
        whole: Bytes of ``weights``, ``gradients``, ``optimizer`` and ``average`` of the whole network.
        local: The same for rank 0.
        by_rule: Bytes of the weights on rank 0, keyed by update rule.
        matrices: Number of matrices, or stacks of matrices, that Muon updates, keyed by their full shape.
        groups: Number of parameters and of tensors of the whole network, keyed by (rule, group, parameters or tensors).
        block: Number of weights in a block after gathering it; tensor parallelism still splits it.
        root: The same for everything outside the blocks.
    """

    parameters: Counter[str]
    flops_per_token: int
    whole: Counter[str]
    local: Counter[str]
    by_rule: Counter[str]
    matrices: Counter[tuple[int, ...]]
    groups: Counter[tuple[str, str, str]]
    block: int
    root: int


@cache
def measure_layout(setup: TrainingSetup) -> LayoutSizes:
    """Apply the real layout as rank 0 to networks with one and two blocks, and extrapolate to all blocks.

    Raises:
        UserError: The network cannot be built, or cannot be split across the ranks.
    """
    one, two = (_measure(setup, n_layer) for n_layer in (1, 2))
    found = {name: _extrapolate(one[name], two[name], setup.config.n_layer) for name in one}
    flops, gathered = found.pop("flops")["all"], found.pop("gathered")
    return LayoutSizes(**found, flops_per_token=flops, block=gathered["block"], root=gathered["root"])


def _extrapolate(one: Counter[Any], two: Counter[Any], n_layer: int) -> Counter[Any]:
    return Counter({key: one[key] + (n_layer - 1) * (two[key] - one[key]) for key in two})


def _measure(setup: TrainingSetup, n_layer: int) -> dict[str, Counter[Any]]:
    """Return the fields of ``LayoutSizes`` for a network with few blocks."""
    net = build_on_meta(setup.config.resized(n_layer), setup.vocab_size, setup.block_size)
    net = net.to(WEIGHT_DTYPES[setup.precision])
    sizes: dict[str, Counter[Any]] = {
        "parameters": Counter(count_parameters_by_part(net)),
        "flops": Counter(all=training_flops_per_token(net)),
    }
    optimizer = setup.optimizer.build(net)
    sizes["whole"] = state_bytes_by_part(optimizer, setup.averaged)
    sizes["matrices"] = Counter(tuple(p.shape) for rule, _, p in _parameters(optimizer) if rule == "muon")
    sizes["groups"] = Counter()
    for rule, name, p in _parameters(optimizer):
        sizes["groups"].update({(rule, name, "parameters"): p.numel(), (rule, name, "tensors"): 1})
    with ExitStack() as stack:
        mesh = None
        if setup.strategy in SHARDED:
            mesh = stack.enter_context(fake_mesh(setup.data_parallel, setup.tensor_parallel, setup.groups))
            parallelize(net, mesh, setup.precision)
        optimizer = setup.optimizer.build(net)
        sizes["local"] = state_bytes_by_part(optimizer, setup.averaged)
        sizes["by_rule"] = Counter()
        for rule, _, p in _parameters(optimizer):
            sizes["by_rule"][rule] += to_local(p).numel() * p.element_size()
        block, root = gathered_sizes(net, mesh)
        sizes["gathered"] = Counter(block=block, root=root)  # the same for any number of blocks
    return sizes


def _parameters(optimizer: Optimizer) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (rule, group name, parameter) for each parameter of an optimizer."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield group.get("rule", type(optimizer).__name__), group.get("name", "tensors"), p


def gathered_sizes(net: GPT, mesh: DeviceMesh | None) -> tuple[int, int]:
    """Return the number of weights in a block and outside the blocks after FSDP2 has gathered their shards.

    The shards of tensor parallelism are not gathered.

    Args:
        net: The network after ``parallelize``.
        mesh: Its device mesh, or None if it is not sharded.
    """
    shards = 1 if mesh is None else fsdp_mesh(mesh).size()  # of equal size, because FSDP2 pads them
    block, total = (shards * sum(to_local(p).numel() for p in module.parameters()) for module in (net.blocks[0], net))
    return block, total - len(net.all_blocks) * block


def gathered_bytes(block: int, root: int, weight_bytes: int, precision: str) -> int:
    """Return an upper bound on the memory in bytes of gathered weights and their gradients with FSDP2.

    It includes the weights of two blocks (the current and the prefetched one), the gradient of one block in the dtype
    of the gathered weights and in that of the reduction, and the weights and gradients outside the blocks, which stay
    gathered from the forward to the backward pass.

    Args:
        block: Number of weights in a block; see ``gathered_sizes``.
        root: Number of weights outside the blocks.
        weight_bytes: Bytes per stored weight.
        precision: The Trainer's precision.
    """
    gathered, reduced = gathered_bytes_per_weight(precision, weight_bytes)
    return block * (3 * gathered + reduced) + 2 * root * weight_bytes


def gathered_bytes_per_weight(precision: str, weight_bytes: int) -> tuple[int, int]:
    """Return the bytes per weight of a block that FSDP2 has gathered, and of its gradients while they are reduced.

    Args:
        precision: The Trainer's precision; only ``bf16-mixed`` gathers in lower precision.
        weight_bytes: Bytes per stored weight.
    """
    return (2, 4) if precision == "bf16-mixed" else (weight_bytes, weight_bytes)


class ActivationSizes(NamedTuple):
    """Bytes that a forward pass saves for the backward pass: ``fixed + n_layer * block_fixed + rows * (...)``.

    Attributes:
        fixed: Independent of the batch: weights of the head cast for autocast, and position tables.
        block_fixed: The same per block.
        row: Per row, outside the blocks: mostly the log-probabilities in float32.
        block_row: Per row and block.
    """

    fixed: int
    block_fixed: int
    row: int
    block_row: int


@cache
def simulate_activations(
    config: GPTConfig,
    vocab_size: int,
    block_size: int,
    precision: str,
    checkpointing: ActivationCheckpointing,
    in_chunks: bool = False,
) -> ActivationSizes:
    """Fit the four coefficients to four simulations: one and two blocks, one and two rows.

    If the loss is computed in chunks, the coefficients are those of chunks with a single position.
    """

    def simulate(n_layer: int, rows: int) -> int:
        # Fused kernels store neither the mask of a window nor that of dropout; simulated, they would be T x T matrices.
        small = replace(config.resized(n_layer), dropout=0.0, sliding_window=None)
        dtype, autocast = WEIGHT_DTYPES[precision], precision.endswith("mixed")
        device = torch.device("cpu")
        chunk = 1 if in_chunks else None
        return activation_bytes(small, vocab_size, block_size, rows, device, dtype, autocast, checkpointing, chunk)

    both, wide, deep, least = simulate(2, 2), simulate(1, 2), simulate(2, 1), simulate(1, 1)
    block_row = both - wide - deep + least
    block_fixed = deep - least - block_row
    row = wide - least - block_row
    return ActivationSizes(least - block_fixed - row - block_row, block_fixed, row, block_row)


def local_config(setup: TrainingSetup) -> GPTConfig:
    """Return the architecture of the heads and hidden channels that one tensor-parallel rank computes.

    Experts are distributed as a whole, and each rank allocates memory for the case that all tokens choose its experts.
    """
    config, size = setup.config, setup.tensor_parallel
    is_mixture = config.feed_forward == "moe"
    return replace(
        config,
        n_head=config.n_head // size,
        n_kv_head=config.kv_heads // size,
        head_dim=config.head_width,
        ffn_dim=config.ffn_width // (1 if is_mixture else size),
        n_experts=max(config.n_experts // size, config.experts_per_token) if is_mixture else config.n_experts,
    )


def rank_memory(setup: TrainingSetup, sizes: LayoutSizes) -> Counter[str]:
    """Return an upper bound on the memory of a rank in bytes, keyed by what it holds.

    - ``weights``, ``gradients``, ``optimizer``, ``average``: the shards of rank 0 in the real layout, unless they are
      in the memory of the host.
    - ``gathered``: with FSDP2, ``gathered_bytes``; with DDP, the buckets of the gradients.
    - ``activations``: what an uncompiled network stores. With activation checkpointing, this includes all activations
      of one block, which the backward pass recomputes. Without FSDP2, autocast also keeps a 16-bit copy of all
      matrices.
    - ``logits``: two more float32 copies of the logits, which exist while their gradient is computed; if the loss is
      computed in chunks, four copies of those of a chunk.

    Tensor parallelism splits activations inside attention and feed-forward networks. The residual stream is replicated,
    and so are the logits, which ``colwise_gather`` gathers.
    """
    memory = Counter(dict.fromkeys(sizes.local, 0)) if setup.cpu_offload else Counter(sizes.local)
    if setup.is_fully_sharded:
        memory["gathered"] = gathered_bytes(sizes.block, sizes.root, setup.weight_bytes, setup.precision)
    elif setup.strategy == "ddp":
        memory["gathered"] = sizes.local["gradients"]
    arguments = local_config(setup), setup.vocab_size, setup.block_size, setup.precision
    in_chunks = setup.loss_chunk_size is not None
    full, n_layer = simulate_activations(*arguments, False, in_chunks), setup.config.n_layer
    kept = simulate_activations(*arguments, setup.checkpointing, in_chunks)
    memory["activations"] = kept.fixed + setup.batch_size * (kept.row + n_layer * kept.block_row)
    if not setup.is_fully_sharded:
        memory["activations"] += n_layer * kept.block_fixed
    if setup.checkpointing:
        memory["activations"] += full.block_fixed + setup.batch_size * full.block_row
    if in_chunks and setup.is_fully_sharded:
        memory["activations"] -= 4 * setup.vocab_size * setup.config.n_embd  # the gradient of the head is in "gathered"
    logits = 4 * setup.vocab_size
    if setup.loss_chunk_size is None:
        memory["logits"] = 2 * logits * setup.tokens_per_rank
    else:
        memory["logits"] = 4 * logits * setup.loss_chunk_size
    return +memory


def suggest_flags(setup: TrainingSetup) -> tuple[dict[str, str], float] | None:
    """Find flags with which a run fits the machine, without changing the number of tokens per optimizer step.

    In this order, which prefers flags that change neither results nor speed much: FSDP2, activation checkpointing,
    smaller micro-batches, tensor parallelism within a node, ``bf16_state``, ``bf16-true``. A flag that suffices alone
    is preferred to a combination. Otherwise flags are added in this order until the run fits; then those that were not
    needed, starting with those that change results or cost most, are removed again. CPU offload, which is slow, is
    suggested only if nothing else helps.

    Returns:
        The values of the flags and the memory per rank in bytes, or None if no combination fits.
    """
    order = (_shard, _recompute, _shrink, _split, _round_state, _halve)
    attempts = [[change] for change in order] + [list(order[: n + 1]) for n in range(1, len(order))]
    attempts.append([_shard, _recompute, _shrink, _offload])
    changes = next((attempt for attempt in attempts if (found := _apply(setup, attempt)) and fits(found[1])), None)
    if changes is None:
        return None
    for change in (_round_state, _split, _shrink, _recompute, _shard):
        fewer = [each for each in changes if each is not change]
        if change in changes and fits(_apply(setup, fewer)[1]):
            changes = fewer
    flags, smaller = _apply(setup, changes)
    return flags, rank_memory(smaller, measure_layout(smaller)).total()


def _apply(setup: TrainingSetup, changes: Sequence[Callable[[TrainingSetup], Change | None]]) -> Change:
    """Apply changes one after another; those that are not possible are skipped."""
    flags = dict[str, str]()
    for change in changes:
        if (found := change(setup)) is not None:
            flags, setup = flags | found[0], found[1]
    return flags, setup


def fits(setup: TrainingSetup) -> bool:
    """Return whether the memory of an accelerator suffices."""
    return rank_memory(setup, measure_layout(setup)).total() <= setup.machine.accelerator.memory


def _shard(setup: TrainingSetup) -> Change | None:
    if setup.strategy != "ddp":
        return None
    return {"--trainer.strategy": "fsdp2"}, replace(setup, strategy="fsdp2")


def _recompute(setup: TrainingSetup) -> Change | None:
    """Recompute as little as fits; otherwise everything."""
    if setup.checkpointing:
        return None
    selective = () if setup.config.dropout else ("keep_matmuls", "keep_attention")
    for checkpointing in (*selective, True):
        smaller = replace(setup, checkpointing=checkpointing)
        if fits(smaller):
            break
    return {"--model.activation_checkpointing": str(checkpointing).lower()}, smaller


def _shrink(setup: TrainingSetup) -> Change | None:
    """Choose the largest micro-batch that fits among the halves, quarters, ... of the rows; otherwise the smallest."""
    smaller = None
    rows = setup.batch_size
    while rows > 1:
        rows = rows // 2 if rows % 2 == 0 else 1
        smaller = replace(setup, batch_size=rows, accumulate=setup.accumulate * setup.batch_size // rows)
        if fits(smaller):
            break
    if smaller is None:
        return None
    return {"--data.batch_size": f"{rows}", "--data.tokens_per_step": f"{smaller.tokens_per_step}"}, smaller


def _split(setup: TrainingSetup) -> Change | None:
    """Choose the smallest tensor-parallel size within a node that fits; otherwise the largest."""
    config, split = setup.config, None
    if setup.strategy not in ("ddp", "fsdp2"):
        return None
    divisible = config.n_head, config.kv_heads, config.ffn_width, setup.machine.per_node
    for size in range(2, setup.machine.per_node + 1):
        if not any(number % size for number in divisible) and supports_tensor_parallel(config, size, setup.precision):
            split = replace(
                setup, strategy="fsdp2_tp", tensor_parallel=size, accumulate=setup.accumulate * size
            )  # fewer replicas compute the same step
            if fits(split):
                break
    if split is None:
        return None
    flags = {"--trainer.strategy": "fsdp2_tp", "--tensor_parallel": f"{split.tensor_parallel}"}
    return flags | {"--data.tokens_per_step": f"{split.tokens_per_step}"}, split


def _round_state(setup: TrainingSetup) -> Change | None:
    if setup.weight_bytes == 2 or setup.bf16_state or not hasattr(setup.optimizer, "bf16_state"):
        return None
    optimizer = _with_bf16_state(setup.optimizer)
    if optimizer is None:
        return None
    return {"--model.optimizer.bf16_state": "true"}, replace(setup, optimizer=optimizer)


@cache  # the same object for the same optimizer, because setups are compared by it
def _with_bf16_state(optimizer: OptimizerRecipe) -> OptimizerRecipe | None:
    """Return the same optimizer with its state in bfloat16, or None if its decay rates are too large for that."""
    changed = copy(optimizer)
    changed.bf16_state = True  # type: ignore[attr-defined]
    try:
        changed.validate()
    except UserError:
        return None
    return changed


def _offload(setup: TrainingSetup) -> Change | None:
    is_possible = setup.is_fully_sharded and setup.tensor_parallel == 1 and setup.precision != "16-mixed"
    if setup.cpu_offload or not is_possible:
        return None
    return {"--cpu_offload": "true"}, replace(setup, cpu_offload=True)


def _halve(setup: TrainingSetup) -> Change | None:
    if setup.precision != "bf16-mixed" or setup.averaged:
        return None
    return {"--trainer.precision": "bf16-true"}, replace(setup, precision="bf16-true")
