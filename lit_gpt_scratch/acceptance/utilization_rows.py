"""Rows about training throughput: tokens per second, model FLOPs utilization (MFU), memory, and where time goes."""

import gc
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from typing_extensions import override

from lit_gpt_scratch.acceptance.profiler_trace import longest_events, read_trace, time_by_kind
from lit_gpt_scratch.acceptance.row import RowContext, RowFailed, Values
from lit_gpt_scratch.batch_types import Batch, BatchLayout, DataInfo
from lit_gpt_scratch.distributed.hardware_defaults import explain_no_compile
from lit_gpt_scratch.losses.cross_entropy import default_max_logits_mb, positions_per_chunk
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.optim import AdamW
from lit_gpt_scratch.profiling.flops_and_memory import activation_bytes, state_bytes, training_flops_per_token
from lit_gpt_scratch.profiling.peak_flops import peak_flops
from lit_gpt_scratch.profiling.peak_memory import peak_memory
from lit_gpt_scratch.tasks import LanguageModel

MIN_GAIN: Final = 1.03
"""A larger micro-batch is kept only if it is faster by this factor; the search ends when it is not."""
TRIAL_STEPS: Final = 5
PEAK_NAMES: Final = {"measured": "measured peak", "nominal": "data sheet's peak"}


@dataclass(frozen=True)
class TrainingShape:
    """Network, batch and settings of the measured training steps.

    Attributes:
        config: Architecture.
        vocab_size: Number of token ids.
        block_size: Tokens per sequence.
        compile: Whether to compile the blocks, the head and the loss, if this machine supports it.
        warmup: Number of steps before the clock starts, in which the network is compiled.
    """

    config: GPTConfig
    vocab_size: int
    block_size: int
    compile: bool
    warmup: int = 3


class RandomTokens(L.LightningDataModule):
    """Data module that yields the same batch of random tokens, so that loading takes no time.

    Args:
        shape: Vocabulary and number of tokens per sequence.
        batch_size: Number of sequences.
        steps: Number of batches.
        pin_memory: Whether to copy batches to memory from which a GPU can read while the host continues.
    """

    def __init__(self, shape: TrainingShape, batch_size: int, steps: int, pin_memory: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(shape.vocab_size, (batch_size, shape.block_size + 1), generator=generator)
        count = torch.tensor(batch_size * shape.block_size)
        self.batch = Batch(input_ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous(), step_labels=count)
        self.steps = steps
        self.pin_memory = pin_memory
        self.info = DataInfo(
            type(self).__name__, shape.vocab_size, shape.block_size, tokenizer_json="", start_of_text=0, end_of_text=0,
            layout=BatchLayout(batch_size, replicas=1, accumulate=1), rank=0,
        )  # fmt: skip

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self.batch] * self.steps, batch_size=None, pin_memory=self.pin_memory)  # type: ignore[arg-type]  # a list is a dataset


class StepClock(L.Callback):
    """Callback that measures the time from the end of the warm-up to the end of training, with the device synchronized.

    Args:
        context: Where the row runs.
        warmup: Number of steps that are not measured.
    """

    def __init__(self, context: RowContext, warmup: int) -> None:
        self.context, self.warmup = context, warmup
        self.seconds = 0.0
        self._began = 0.0

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.warmup:
            self.context.synchronize()
            self._began = time.perf_counter()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.context.synchronize()
        self.seconds = time.perf_counter() - self._began
        for optimizer in trainer.optimizers:
            optimizer.state.clear()  # otherwise, the trainer copies it to the host
            optimizer.zero_grad(set_to_none=True)


class StepProfile(L.Callback):
    """Callback that profiles all steps after the warm-up.

    Args:
        context: Where the row runs.
        warmup: Number of steps that are not profiled.
    """

    def __init__(self, context: RowContext, warmup: int) -> None:
        self.context, self.warmup = context, warmup
        cuda = [ProfilerActivity.CUDA] if context.on_cuda else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *cuda])

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.warmup:
            self.context.synchronize()
            self.profiler.start()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.context.synchronize()
        self.profiler.stop()


@dataclass(frozen=True)
class TrainedSteps:
    """What ``train_steps`` measured.

    Attributes:
        batch_size: Sequences per micro-batch.
        tokens_per_second: Training speed after the warm-up.
        flops_per_token: Floating-point operations per token.
        parameters: Number of parameters.
        compiled: Whether the network was compiled.
        peak_bytes: Peak memory, or None if it is not known.
        state_bytes: Memory of weights, gradients and optimizer state that the plan of ``fit`` predicts.
    """

    batch_size: int
    tokens_per_second: float
    flops_per_token: int
    parameters: int
    compiled: bool
    peak_bytes: int | None
    state_bytes: int


def measure_utilization(
    context: RowContext, shape: TrainingShape, batch_size: int, max_batch_size: int, steps: int
) -> Iterator[Values]:
    """Find the fastest micro-batch by doubling, and yield its speed, utilization and memory.

    Args:
        context: Where the row runs.
        shape: What is trained.
        batch_size: First micro-batch of the search; if it does not fit into the memory, it is halved until it does.
        max_batch_size: Largest micro-batch of the search.
        steps: Number of measured steps with the fastest micro-batch.

    Raises:
        RowFailed: Not even one sequence fits into the memory.
    """
    best: TrainedSteps | None = None
    size, largest = batch_size, max_batch_size
    while 1 <= size <= largest:
        try:
            found = train_steps(context, shape, size, TRIAL_STEPS)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            yield {"out of memory at micro-batch": size}
            largest, size = size - 1, size // 2 if best is None else size
            continue
        if best is not None and found.tokens_per_second < MIN_GAIN * best.tokens_per_second:
            break
        best = found
        yield from describe_steps(context, best)
        size *= 2
    if best is None:
        raise RowFailed("not even a micro-batch of 1 fits into the memory")
    final = train_steps(context, shape, best.batch_size, steps)
    yield from describe_steps(context, final)
    sizes = shape.vocab_size, shape.block_size, best.batch_size
    chunk = positions_per_chunk(shape.vocab_size, default_max_logits_mb(context.device))
    kept = activation_bytes(shape.config, *sizes, context.device, torch.float32, autocast=True, loss_chunk_size=chunk)
    planned = best.state_bytes + kept
    yield {
        "planned memory GB, not compiled": planned / 1e9,
        "measured memory of planned": None if final.peak_bytes is None else final.peak_bytes / planned,
    }


def describe_steps(context: RowContext, found: TrainedSteps) -> Iterator[Values]:
    """Yield what was measured, with the utilization of the measured peak and of the data sheet's peak."""
    flops = found.tokens_per_second * found.flops_per_token
    yield {
        "parameters M": found.parameters / 1e6,
        "micro-batch": found.batch_size,
        "tokens/s": found.tokens_per_second,
        "model TFLOP/s": flops / 1e12,
        "compiled": found.compiled,
    }
    for name, peak in peak_flops(context.device, torch.bfloat16).items():
        yield {f"MFU of {PEAK_NAMES[name]}": flops / peak}
    yield {"peak memory GB": None if found.peak_bytes is None else found.peak_bytes / 1e9}


def profile_training(
    context: RowContext, shape: TrainingShape, batch_size: int, steps: int, top: int
) -> Iterator[Values]:
    """Profile training steps, keep the Chrome trace, and yield the share of each kind of kernel in the time.

    Args:
        context: Where the row runs; the trace is written to ``context.out``.
        shape: What is trained.
        batch_size: Sequences per micro-batch.
        steps: Number of profiled steps.
        top: Number of kernels that are named.
    """
    profiled = StepProfile(context, shape.warmup)
    train_steps(context, shape, batch_size, steps, profiled)
    path = context.out / "training_trace.json.gz"
    profiled.profiler.export_chrome_trace(str(path))
    events = read_trace(path)
    seconds = time_by_kind(events)
    total = sum(seconds.values())
    yield {"ms per step": 1000 * total / steps, "trace": path.name, "trace MB": path.stat().st_size / 1e6}
    yield {f"{kind} share": taken / total for kind, taken in seconds.items()}
    yield {
        f"kernel {_short(name)}": f"{taken / total:.1%}, {calls} calls"
        for name, taken, calls in longest_events(events, top)
    }


def train_steps(
    context: RowContext, shape: TrainingShape, batch_size: int, steps: int, *callbacks: L.Callback
) -> TrainedSteps:
    """Train in bf16-mixed with AdamW and gradient clipping on random tokens; measure the steps after the warm-up."""
    gc.collect()
    torch.compiler.reset()  # each size is compiled with static shapes
    if context.on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(context.device)
    clock = StepClock(context, shape.warmup)
    compile = shape.compile and explain_no_compile(context.device, requested=True) is None
    task = LanguageModel(gpt=shape.config, optimizer=AdamW(lr=1e-4), compile=compile)
    trainer = L.Trainer(
        accelerator="gpu" if context.on_cuda else "cpu", devices=1, precision="bf16-mixed", gradient_clip_val=1.0,
        max_steps=shape.warmup + steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=[*callbacks, clock],
        default_root_dir=context.scratch,
    )  # fmt: skip
    try:
        trainer.fit(task, datamodule=RandomTokens(shape, batch_size, shape.warmup + steps, context.on_cuda))
    except BaseException:  # its traceback refers to the task and the trainer, and with them to their memory
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        for parameter in task.parameters():
            parameter.grad = None
            parameter.data = parameter.data.new_empty(0)
        raise
    return TrainedSteps(
        batch_size=batch_size,
        tokens_per_second=steps * batch_size * shape.block_size / clock.seconds,
        flops_per_token=training_flops_per_token(task.net),
        parameters=sum(p.numel() for p in task.net.parameters()),
        compiled=compile,
        peak_bytes=peak_memory(context.device),
        state_bytes=state_bytes(trainer.optimizers[0]),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on an accelerator or on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(
        re.search(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", str(error))
    )


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."
