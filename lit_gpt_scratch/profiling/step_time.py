"""Predict the duration of an optimizer step from FLOPs, memory traffic and communication.

The model is stated in notebooks/reference/hardware.md. Its constants are measurements of single operations by others,
not fitted to training runs. It leaves out the latency of kernel launches, waiting for data, logging and validation, so
steps of small models are slower than predicted.
"""

import math
from dataclasses import dataclass
from typing import Final

from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt_scratch.model.module_metadata import flops_per_token, linear_flops_per_token
from lit_gpt_scratch.profiling.flops_and_memory import build_on_meta
from lit_gpt_scratch.profiling.layout_sizes import (
    SHARDED,
    LayoutSizes,
    TrainingSetup,
    gathered_bytes_per_weight,
    local_config,
    simulate_activations,
)

MATMUL_SHARE: Final = 0.9
"""Share of ``Accelerator.max_matmul_share`` that matmuls of ordinary shapes reach; 0.72 of the peak on H100, as cuBLAS
reaches with 8192 x 8192 matrices (https://cudaforfun.substack.com/p/outperforming-cublas-on-h100-a-worklog)."""
MEMORY_SHARE: Final = 0.9
"""Share of the nominal memory bandwidth that elementwise kernels reach."""
LINK_SHARE: Final = 0.8
"""Share of the nominal bandwidth of links and networks that collective operations reach
(https://github.com/stas00/ml-engineering/tree/master/network)."""
INTERFERENCE: Final = 0.15
"""Slowdown of computation while communication runs, which occupies multiprocessors and memory, as a fraction of the
communication time; ``processor_usage`` of NVLink in Calculon's A100 (https://github.com/calculon-ai/calculon)."""
ATTENTION_BACKWARD: Final = 2.5
"""Matmuls in the backward pass of fused attention, which recomputes the scores, per matmul of the forward pass."""
FORWARD_PASSES, BACKWARD_PASSES, RECOMPUTE_PASSES = 2, 3, 2
"""Number of times that each saved activation crosses the memory bus: written and read in the forward pass; read in the
backward pass, which also writes and reads its gradient; written and read again if it is recomputed."""
RECOMPUTED: Final[dict[ActivationCheckpointing, tuple[bool, bool]]] = {
    False: (False, False), "keep_matmuls": (False, False), "keep_attention": (False, True), True: (True, True),
}  # fmt: skip
"""Whether attention and the matmuls of linear layers are recomputed, keyed by what each block stores."""
OPTIMIZER_PASSES: Final = {"adamw": 7, "muon": 12}
"""Number of times that a tensor of the weight's size is read or written per step, keyed by update rule.

AdamW reads weight, gradient and two moments, and writes all but the gradient. Muon's momentum, Nesterov step, decay and
update are separate operations. Other rules are assumed to have those of AdamW.
"""
BF16_STATE_PASSES: Final = {"adamw": 6, "muon": 3}
"""The same for a state in bfloat16: each moment is converted to float32 before and back after the update."""
CLIP_PASSES, AVERAGE_PASSES = 3, 3
"""The same for clipping by norm (norm; read and write), and for a moving average (read twice, write once)."""
NEWTON_SCHULZ_STEPS: Final = 5


@dataclass(frozen=True)
class StepTime:
    """Predicted duration of an optimizer step in seconds, and its communication.

    Attributes:
        matmuls: Linear layers, including recomputation.
        attention: Fused attention, including recomputation.
        memory_bound: Elementwise operations, norms and the loss.
        communication: Communication that computation does not hide, and the slowdown by communication that it hides.
        optimizer: Optimizer, gradient clipping and moving average, including Muon's communication.
        sent_bytes: Bytes that each rank sends per step.
    """

    matmuls: float
    attention: float
    memory_bound: float
    communication: float
    optimizer: float
    sent_bytes: float

    @property
    def total(self) -> float:
        """Duration of the step."""
        return self.matmuls + self.attention + self.memory_bound + self.communication + self.optimizer


def predict_step(setup: TrainingSetup, sizes: LayoutSizes) -> StepTime:
    """Predict the duration of an optimizer step."""
    net = build_on_meta(setup.config.resized(n_layer=1), setup.vocab_size, setup.block_size)
    block, depth, tokens = net.blocks[0], setup.config.multi_token_depth, setup.tokens_per_rank
    n_layer = setup.config.n_layer + depth
    linear = flops_per_token(block, 0) / setup.tensor_parallel
    visible = _visible_share(setup.config, setup.block_size)
    scores = visible * (flops_per_token(block, setup.block_size) / setup.tensor_parallel - linear)
    head = (1 + depth) * linear_flops_per_token(net.head) / setup.tensor_parallel
    head += depth * 4 * setup.config.n_embd**2  # ``MultiTokenModule.combine``, which is not split
    speed = _matmul_flops(setup)
    matmul, matmul_blocks = (tokens * flops / speed for flops in (n_layer * linear + head, n_layer * linear))
    accelerator = setup.machine.accelerator
    attention = n_layer * tokens * scores / (accelerator.attention_share * _nominal_flops(setup))

    full = simulate_activations(local_config(setup), setup.vocab_size, setup.block_size, setup.precision, False)
    in_blocks = setup.batch_size * n_layer * full.block_row / _memory_bandwidth(setup)
    saved = setup.batch_size * full.row / _memory_bandwidth(setup) + in_blocks
    recompute = bool(setup.checkpointing)
    repeats_attention, repeats_matmuls = RECOMPUTED[setup.checkpointing]
    recomputed_attention, recomputed_matmuls = repeats_attention * attention, repeats_matmuls * matmul_blocks
    forward = matmul + attention + FORWARD_PASSES * saved
    backward = 2 * matmul + ATTENTION_BACKWARD * attention + BACKWARD_PASSES * saved
    backward += recomputed_matmuls + recomputed_attention + recompute * RECOMPUTE_PASSES * in_blocks
    exposed, sent = _communication(setup, sizes, forward, backward)
    n = setup.accumulate
    optimizer, optimizer_sent = _optimizer(setup, sizes)
    return StepTime(
        matmuls=n * (3 * matmul + recomputed_matmuls),
        attention=n * ((1 + ATTENTION_BACKWARD) * attention + recomputed_attention),
        memory_bound=n * ((FORWARD_PASSES + BACKWARD_PASSES) * saved + recompute * RECOMPUTE_PASSES * in_blocks),
        communication=exposed,
        optimizer=optimizer,
        sent_bytes=sent + optimizer_sent,
    )


def _visible_share(config: GPTConfig, block_size: int) -> float:
    """Return the share of scores that attention kernels do not skip, on average over the blocks."""
    window = min(0.5, (config.sliding_window or block_size) / block_size)
    return sum(window if config.is_local(layer) else 0.5 for layer in range(config.n_layer)) / config.n_layer


def ring_bytes(n_bytes: float, ranks: int) -> float:
    """Return the bytes that each rank sends in a ring all-gather or reduce-scatter of ``n_bytes`` in total."""
    return n_bytes * (ranks - 1) / ranks


def collective_bandwidth(setup: TrainingSetup, ranks: int, stride: int) -> float:
    """Return the bandwidth of a ring of ``ranks`` ranks that are ``stride`` apart, in bytes per second and rank.

    The ring enters and leaves each node through the network adapters of its members in the node.
    """
    machine = setup.machine
    members = max(1, min(ranks, machine.per_node // stride))
    accelerator = machine.accelerator
    if ranks <= members:
        return LINK_SHARE * accelerator.link_bandwidth
    network = members * accelerator.network_bandwidth
    return LINK_SHARE * (min(accelerator.link_bandwidth, network) if members > 1 else network)


def _communication(setup: TrainingSetup, sizes: LayoutSizes, forward: float, backward: float) -> tuple[float, float]:
    """Return the seconds per step that communication adds, and the bytes that each rank sends.

    Args:
        setup: The run.
        sizes: Its layout.
        forward: Seconds of computation in the forward pass of a micro-batch.
        backward: The same for the backward pass.
    """
    split, split_sent = _tensor_parallel(setup)
    n, shards = setup.accumulate, setup.n_shards
    bandwidth = collective_bandwidth(setup, shards, setup.tensor_parallel)
    if setup.strategy == "ddp":
        sent = 2 * ring_bytes(sizes.local["gradients"], shards)  # all-reduce, after the last micro-batch only
        return _overlap(backward, sent / bandwidth) + n * split, sent
    if not setup.is_fully_sharded:
        return n * split, n * split_sent
    gathered, reduced = gathered_bytes_per_weight(setup.precision, setup.weight_bytes)
    blocks = setup.config.n_layer * sizes.block
    gather, reduce = (ring_bytes(blocks * size, shards) for size in (gathered, reduced))
    root = ring_bytes(sizes.root * setup.weight_bytes, shards)  # gathered before, and reduced after everything else
    first = gather / setup.config.n_layer
    # HSDP then averages the shards of the gradients across groups.
    across = collective_bandwidth(setup, setup.groups, shards * setup.tensor_parallel)
    block_shards, root_shards = (
        2 * ring_bytes(elements / shards * size, setup.groups)
        for elements, size in ((blocks, reduced), (sizes.root, setup.weight_bytes))
    )
    hidden = _overlap(forward, (gather - first) / bandwidth)
    hidden += _overlap(backward, (gather + reduce) / bandwidth + block_shards / across)
    sent = 2 * gather + reduce + 2 * root + block_shards + root_shards
    exposed = (first + 2 * root) / bandwidth + root_shards / across
    return n * (hidden + exposed + split), n * (sent + split_sent)


def _overlap(compute: float, communication: float) -> float:
    """Return the seconds that communication adds to computation that runs at the same time."""
    return max(compute + INTERFERENCE * min(communication, compute), communication) - compute


def _tensor_parallel(setup: TrainingSetup) -> tuple[float, float]:
    """Return the seconds of a micro-batch's tensor-parallel collectives, which nothing hides, and the bytes sent.

    Each block has two all-reduces of the residual stream in the forward pass and two in the backward pass; activation
    checkpointing repeats those of the forward pass. Outside the blocks, the embedding and the gradient of the head's
    input are reduced, and the logits are gathered.
    """
    size, tokens, n_embd = setup.tensor_parallel, setup.tokens_per_rank, setup.config.n_embd
    if size == 1:
        return 0.0, 0.0
    stream = tokens * n_embd * setup.compute_bytes
    sent = 2 * ring_bytes(stream, size) * (2 * setup.config.n_layer * (2 + bool(setup.checkpointing)) + 1)
    sent += 2 * ring_bytes(tokens * n_embd * setup.weight_bytes, size)
    sent += ring_bytes(tokens * setup.vocab_size * setup.compute_bytes, size)
    return sent / collective_bandwidth(setup, size, 1), sent


def _optimizer(setup: TrainingSetup, sizes: LayoutSizes) -> tuple[float, float]:
    """Return the seconds of the optimizer per step, and the bytes that each rank sends."""
    passes = setup.clips * CLIP_PASSES + setup.averaged * AVERAGE_PASSES
    traffic = 0
    for rule, held in sizes.by_rule.items():
        converted = BF16_STATE_PASSES.get(rule, 0) if setup.bf16_state and setup.weight_bytes > 2 else 0
        traffic += (passes + OPTIMIZER_PASSES.get(rule, 7) + converted) * held
    seconds = traffic / _memory_bandwidth(setup)
    if not sizes.matrices:
        return seconds, 0.0
    ranks = setup.machine.devices if setup.strategy in SHARDED else 1
    replicated = getattr(setup.optimizer, "row_beta", None) is not None  # NorMuon gathers all matrices on every rank
    flops = sum(
        newton_schulz_flops(*shape[-2:]) * (n if replicated else math.ceil(n / sharers))
        for shape, n, sharers in (
            # the groups of hybrid sharding repeat the updates of stacks, which are not gathered
            (shape, count * math.prod(shape[:-2]), ranks if len(shape) == 2 else max(1, ranks // setup.groups))
            for shape, count in sizes.matrices.items()
        )
    )
    accelerator = setup.machine.accelerator
    seconds += flops / (MATMUL_SHARE * accelerator.max_matmul_share * accelerator.tensor_core_flops)
    elements = sum(  # stacks are not gathered
        count * math.prod(shape) for shape, count in sizes.matrices.items() if replicated or len(shape) == 2
    )
    sent = ring_bytes(2 * elements, ranks) if replicated else 2 * ring_bytes(2 * elements / ranks, ranks)  # in bfloat16
    bandwidth = accelerator.network_bandwidth if setup.machine.nodes > 1 else accelerator.link_bandwidth
    return seconds + sent / (LINK_SHARE * bandwidth), sent


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Return the FLOPs of orthogonalizing a matrix: per iteration, two products with it and a square of its Gram."""
    small, large = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * (4 * small * small * large + 2 * small**3)


def _nominal_flops(setup: TrainingSetup) -> float:
    """Return the data sheet's FLOP/s for the dtype of the matmuls."""
    if setup.precision == "32-true":
        return 1e12 * setup.machine.accelerator.float32_tflops
    return setup.machine.accelerator.tensor_core_flops


def _matmul_flops(setup: TrainingSetup) -> float:
    return MATMUL_SHARE * setup.machine.accelerator.max_matmul_share * _nominal_flops(setup)


def _memory_bandwidth(setup: TrainingSetup) -> float:
    return MEMORY_SHARE * setup.machine.accelerator.memory_bandwidth


def utilization(setup: TrainingSetup, sizes: LayoutSizes, seconds: float) -> float:
    """Return the model FLOPs utilization: model FLOPs of a step relative to the nominal FLOP/s of all devices."""
    flops = sizes.flops_per_token * setup.tokens_per_step
    return flops / (seconds * setup.machine.devices * _nominal_flops(setup))
