"""Time a few training steps on random tokens, without text, a trainer or a run folder."""

import statistics
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import torch

from lit_gpt_scratch.distributed.hardware_defaults import normalize_precision
from lit_gpt_scratch.distributed.validate_hardware import raise_memory_error
from lit_gpt_scratch.kernels.compiler_backend import CompilerBackend
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt_scratch.optim.optimizers import OptimizerRecipe

MAX_STEPS, MAX_SECONDS = 8, 3.0
"""Number of timed steps, and time in seconds after which no further step is timed."""
AUTOCAST: Final = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Autocast dtype, keyed by ``trainer.precision``; other precisions are timed in the dtype of the weights."""
WEIGHTS: Final = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
"""Dtype of the weights, keyed by ``trainer.precision``; float32 for other precisions."""


class TimedSteps(NamedTuple):
    """Duration of training steps in seconds."""

    first: float
    """First step, which compiles."""
    median: float
    """Median of the following steps."""


@raise_memory_error()
def time_steps(
    config: GPTConfig,
    vocab_size: int,
    block_size: int,
    batch_size: int,
    accumulate: int,
    optimizer: OptimizerRecipe,
    device: torch.device,
    precision: str | int,
    checkpointing: ActivationCheckpointing = False,
    compile_blocks: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> TimedSteps:
    """Time a few optimizer steps of a new model, including its modules for multi-token prediction.

    Args:
        config: Architecture of the model.
        vocab_size: Number of token ids.
        block_size: Number of tokens per sequence.
        batch_size: Number of sequences per micro-batch.
        accumulate: Number of micro-batches per step.
        optimizer: The optimizer.
        device: Device that runs the steps.
        precision: Value of ``trainer.precision``.
        checkpointing: What each block stores for the backward pass.
        compile_blocks: Whether to compile the blocks, as ``model.compile`` does.
        clock: Function that returns the time in seconds.

    Raises:
        MemoryError: The steps do not fit into the memory of the device.
    """
    precision = normalize_precision(precision)
    with torch.random.fork_rng(devices=[]):
        net = GPT(config, vocab_size, block_size).to(device, WEIGHTS.get(precision, torch.float32))
        net.activation_checkpointing = checkpointing
        ids = torch.randint(vocab_size, (batch_size, block_size + 1)).to(device)
    if compile_blocks:
        backend = CompilerBackend(required=False)
        for block in net.all_blocks:
            block.compile(backend=backend)
    rule = optimizer.build(net)
    autocast = torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) <= MAX_STEPS and sum(seconds[1:]) < MAX_SECONDS):
        started = clock()
        for _ in range(accumulate):
            with autocast:
                states = net.hidden_states_by_depth(ids[:, :-1])
                losses = [token_cross_entropy(net.apply_head(x), ids[:, 1 + i :])[0] for i, x in enumerate(states)]
                loss = torch.stack(losses).mean() / (batch_size * block_size)
            loss.backward()  # type: ignore[no-untyped-call]  # not annotated in torch
        rule.step()
        rule.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(clock() - started)
    return TimedSteps(seconds[0], statistics.median(seconds[1:]))
