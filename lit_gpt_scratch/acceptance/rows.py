"""The rows of the acceptance table, the most valuable first."""

from dataclasses import replace
from typing import Any, Final

from lit_gpt_scratch.acceptance.decoding_rows import measure_decoding
from lit_gpt_scratch.acceptance.distributed_rows import measure_all_reduce, measure_fsdp2, measure_layout_parity
from lit_gpt_scratch.acceptance.fit_rows import (
    SMALL_DATA,
    SMALL_FIT,
    SMALL_NETWORK,
    measure_callback_cost,
    measure_fit,
    measure_resume,
    measure_time_to_loss,
)
from lit_gpt_scratch.acceptance.hardware_rows import describe_hardware, measure_peaks
from lit_gpt_scratch.acceptance.network_rows import compare_backends, compare_network
from lit_gpt_scratch.acceptance.row import AcceptanceRow, a_gpu_per_process, cuda, gpus, int8_weights, libraries, text
from lit_gpt_scratch.acceptance.utilization_rows import TrainingShape, measure_utilization, profile_training
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.presets import PRESETS

FIT: Final = libraries("jsonargparse", "datasets", "rensa", "platformdirs", "tiktoken", "tensorboard")
"""Requirement of the rows that run ``fit``: libraries that a PyTorch image may lack."""

# Networks

CHECKED: Final = GPTConfig(n_layer=4, n_head=4, n_embd=256, initialisation="gpt2")
"""Network of the comparisons; with ``zero`` initialization, most gradients of the first step would be zero."""
CHECKED_ON_CPU: Final = replace(CHECKED, n_layer=1, n_head=2, n_embd=32)
GPT2: Final = replace(PRESETS["gpt2_124m"], vocab_multiple=64)
SIZES: Final = {
    "124M": GPT2,
    "350M": replace(PRESETS["gpt2_350m"], vocab_multiple=64),
    "1.3B": replace(GPT2, n_layer=24, n_head=16, n_embd=2048),  # GPT-3 XL with 16 heads of 128
}
FIRST_MICRO_BATCH: Final = {"124M": 64, "350M": 32, "1.3B": 16}
"""First micro-batch of the search at 1,024 tokens; half as many sequences at 2,048 tokens."""
GPT2_VOCABULARY: Final = 50_257
TINY: Final = GPTConfig(n_layer=1, n_head=2, n_embd=32)
TINY_SHAPE: Final = TrainingShape(TINY, vocab_size=300, block_size=32, compile=False, warmup=1)

# Flags of fit

DETERMINISTIC: Final = ("--trainer.deterministic=warn",)
"""On a GPU, the backward pass of attention adds in an order that varies, unless PyTorch is told not to."""
FIT_124M: Final = (
    "--preset=gpt2_124m", "--model.gpt.vocab_multiple=50304", "--data.block_size=1024", "--data.batch_size=16",
    "--trainer.limit_val_batches=0",
)  # fmt: skip
"""The tokenizer of the default has few tokens; the token table and the head are padded to GPT-2's size."""
PPO_TASK: Final = ("--model=PPO", "--data=Prompts")
"""The classes must precede their arguments."""
PPO_SETTINGS: Final = (
    "--model.reward=full_stop", "--model.gpt.initialisation=gpt2", "--data.block_size=96", "--data.reply_tokens=24",
    "--trainer.limit_val_batches=0",
)  # fmt: skip
SHAKESPEARE: Final = (
    "--data.vocab_size=257", "--data.block_size=256", "--data.batch_size=64", "--data.validation_share=0.1",
    "--model.gpt.n_layer=6", "--model.gpt.n_head=6", "--model.gpt.n_embd=384", "--model.gpt.dropout=0.2",
    "--trainer.max_steps=2000", "--trainer.val_check_interval=50", "--inspect.every_n_steps=0",
)  # fmt: skip
"""nanoGPT's GPU task: 256 bytes and the end of text are the vocabulary, so tokens are characters."""
SHAKESPEARE_ON_CPU: Final = (
    *SMALL_DATA[1:], *SMALL_NETWORK, "--trainer.max_steps=4", "--trainer.val_check_interval=2",
)  # fmt: skip
SHAKESPEARE_LOSS: Final = 1.4697
"""Validation loss that nanoGPT states for its GPU task."""


def comparison(name: str, backend: str, seconds: float, precisions: list[str], **sizes: Any) -> AcceptanceRow:
    """Return a row that compares a compiled network with an attention backend with the CPU; not compiled on a CPU."""
    full = {
        "config": CHECKED, "backend": backend, "precisions": precisions, "compiled": [True], "batch_size": 4,
        "block_size": 512, **sizes,
    }  # fmt: skip
    small = {"config": CHECKED_ON_CPU, "precisions": ["fp32", "bf16"], "compiled": [False], "block_size": 32}
    return AcceptanceRow(name, compare_network, seconds, full, small, () if backend == "manual" else (cuda,))


def fit_row(
    name: str, seconds: float, *flags: str, on_cpu: tuple[str, ...] = (), cuda_only: bool = False
) -> AcceptanceRow:
    """Return a row that runs the default of ``fit`` for 100 steps, with more flags."""
    return AcceptanceRow(
        name, measure_fit, seconds, {"flags": ("--trainer.max_steps=100", *flags)},
        {"flags": (*SMALL_FIT, "--trainer.max_steps=6", *flags, *on_cpu)}, (cuda, FIT) if cuda_only else (FIT,),
    )  # fmt: skip


def utilization(size: str, block_size: int, seconds: float) -> AcceptanceRow:
    """Return a row that measures the utilization at a size and context length; tiny on a CPU."""
    shape = TrainingShape(SIZES[size], GPT2_VOCABULARY, block_size, compile=True)
    first = FIRST_MICRO_BATCH[size] * 1024 // block_size
    small = {"shape": TINY_SHAPE, "batch_size": 1, "max_batch_size": 2, "steps": 4}
    full = {"shape": shape, "batch_size": first, "max_batch_size": 32 * first, "steps": 30}
    return AcceptanceRow(f"MFU, {size}, {block_size} tokens", measure_utilization, seconds, full, small)


def decoding(name: str, seconds: float, compile: bool, **sizes: Any) -> AcceptanceRow:
    """Return a row that measures decoding with one stream and with 64; tiny on a CPU."""
    full = {
        "config": GPT2, "vocab_size": GPT2_VOCABULARY, "block_size": 1024, "rows": (64, 1), "new_tokens": 128,
        "compile": compile, **sizes,
    }  # fmt: skip
    small = {"config": TINY, "vocab_size": 300, "block_size": 32, "rows": (1,) if compile else (2, 1), "new_tokens": 8}
    return AcceptanceRow(name, measure_decoding, seconds, full, small, (cuda,) if sizes.get("cuda_graphs") else ())


def callback_cost(guard: str, seconds: float) -> AcceptanceRow:
    """Return a row that measures the default callbacks with a mode of the guard."""
    trace = f"callbacks_{guard}_trace"
    full = {
        "trace": trace,
        "warmup": 12,
        "profiled": 10,
        "blocks": 8,
        "block_steps": 20,
        "flags": (*FIT_124M, f"--guard={guard}"),
    }
    small = {
        "trace": trace,
        "warmup": 2,
        "profiled": 4,
        "blocks": 4,
        "block_steps": 2,
        "flags": (*SMALL_FIT, f"--guard={guard}"),
    }
    return AcceptanceRow(f"callbacks, guard {guard}", measure_callback_cost, seconds, full, small, (FIT,))


ROWS: Final = (
    AcceptanceRow("machine", describe_hardware, 30),
    AcceptanceRow(
        "peak throughput", measure_peaks, 40, {"copy_bytes": 2**32, "fp8_size": 8192, "repeats": 10},
        {"copy_bytes": 2**26, "fp8_size": 64, "repeats": 3},
    ),
    AcceptanceRow(
        "network, backends, not compiled", compare_backends, 40,
        {
            "config": CHECKED, "batch_size": 4, "block_size": 512, "documents": ["flex"],
            "backends": {
                "flash": ["bf16", "fp16"], "cudnn": ["bf16", "fp16"], "efficient": ["fp32", "bf16", "fp16"],
                "manual": ["fp32", "bf16", "fp16"], "flex": ["bf16"],
            },
        },
        {"config": CHECKED_ON_CPU, "block_size": 32, "backends": {"flash": ["fp32"], "manual": ["fp32", "bf16"]}},
    ),
    utilization("124M", 1024, 100),
    AcceptanceRow(
        "profile, 124M", profile_training, 60,
        {"shape": TrainingShape(GPT2, GPT2_VOCABULARY, 1024, compile=True), "batch_size": 32, "steps": 3, "top": 8},
        {"shape": TINY_SHAPE, "batch_size": 2, "steps": 2},
    ),
    utilization("1.3B", 1024, 120),
    utilization("350M", 1024, 100),
    fit_row("fit, bf16-mixed", 80, "--trainer.precision=bf16-mixed"),
    callback_cost("warn", 80),
    AcceptanceRow(
        "tiny Shakespeare", measure_time_to_loss, 60, {"flags": SHAKESPEARE, "target": SHAKESPEARE_LOSS},
        {"flags": (*SHAKESPEARE_ON_CPU, "--model.compile=false"), "target": 100.0}, (text, FIT),
    ),
    decoding("decoding, bf16, compiled", 100, compile=True),
    fit_row("fit, fp16 with a gradient scaler", 60, "--trainer.precision=16-mixed", cuda_only=True),
    AcceptanceRow(
        "resume after a kill, bits", measure_resume, 150,
        {
            "flags": (*DETERMINISTIC, "--trainer.max_steps=100", "--checkpoint.every_n_steps=10",
                      "--model.compile=false"),
            "kills": 1,
        },
        {"flags": (*SMALL_FIT, "--trainer.max_steps=12", "--checkpoint.every_n_steps=2"), "kills": 1}, (FIT,),
    ),
    callback_cost("act", 80),
    AcceptanceRow(
        "FSDP2, one process", measure_fsdp2, 60, {"flags": ("--trainer.max_steps=30",), "devices": 1},
        {"flags": (*SMALL_FIT, "--trainer.max_steps=4")}, (FIT,),
    ),
    AcceptanceRow(
        "PPO, generation share", measure_fit, 80,
        {"flags": (*PPO_TASK, *PPO_SETTINGS, "--trainer.max_steps=25", "--data.batch_size=64")},
        {"flags": (
            *PPO_TASK, *PPO_SETTINGS, *SMALL_NETWORK, "--model.compile=false", "--data.vocab_size=300",
            "--data.reply_tokens=6", "--data.batch_size=4", "--trainer.max_steps=6", "--trainer.log_every_n_steps=2",
            "--model.steps_per_phase=1",
        )}, (FIT,),
    ),
    comparison("network, FlexAttention, documents", "flex", 60, ["fp32", "bf16"], documents=True),
    comparison("network, flash attention", "flash", 50, ["bf16", "fp16"]),
    comparison("network, efficient attention", "efficient", 50, ["fp32", "bf16", "fp16"]),
    comparison("network, cuDNN attention", "cudnn", 50, ["bf16", "fp16"]),
    comparison("network, manual attention", "manual", 50, ["fp32", "bf16", "fp16"]),
    AcceptanceRow(
        "tiny Shakespeare, not compiled", measure_time_to_loss, 60,
        {"flags": (*SHAKESPEARE, "--model.compile=false"), "target": SHAKESPEARE_LOSS}, {}, (text, cuda, FIT),
    ),
    fit_row("fit, compiled with the loss", 90, "--model.compile=true", on_cpu=("--model.compile=true",)),
    decoding("decoding, bf16, not compiled", 40, compile=False),
    decoding("decoding, bf16, CUDA graphs", 100, compile=True, cuda_graphs=True),
    AcceptanceRow("decoding, int8", measure_decoding, 60, requires=(int8_weights,)),
    AcceptanceRow(
        "all-reduce, two processes", measure_all_reduce, 40, {"processes": 2, "n_bytes": 2**30, "repeats": 10},
        {"n_bytes": 2**20, "repeats": 2}, (a_gpu_per_process,),
    ),
    AcceptanceRow(
        "layouts on two GPUs", measure_layout_parity, 120,
        {"flags": ("--trainer.accelerator=gpu", "--trainer.max_steps=20", "--trainer.limit_val_batches=0",
                   *SMALL_DATA, "--model.gpt.n_layer=2", "--model.gpt.n_head=4", "--model.gpt.n_embd=128",
                   "--model.gpt.initialisation=gpt2", "--model.compile=false"),
         "layouts": ("ddp 2", "fsdp2 2", "tp 2"), "cases": ("float32",)}, {}, (gpus(2), FIT),
    ),
    utilization("124M", 2048, 100),
    utilization("1.3B", 2048, 120),
    utilization("350M", 2048, 100),
)  # fmt: skip
