"""Check the Trainer's hardware flags against this machine before anything is built; errors suggest a valid flag."""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lit_gpt_scratch.batch_types import BatchLayout
from lit_gpt_scratch.distributed.hardware_defaults import default_precision
from lit_gpt_scratch.distributed.strategies import ModelParallel
from lit_gpt_scratch.errors import UserError

FSDP1_NAMES: Final = ("fsdp", "fsdp_cpu_offload")
"""Lightning's strategy names for the first version of FSDP."""
MAX_CPU_PROCESSES: Final = 1024
"""Maximum number of processes that share a CPU; each needs its own copy of the libraries."""
CHECKPOINTING_FLAG: Final = "--model.activation_checkpointing true"


def validate_hardware(trainer: Mapping[str, Any], cpu_offload: bool = False) -> None:
    """Check that this machine has the requested accelerator, devices, strategy and precision.

    Without this check, Lightning could silently use another precision, train until the loss is NaN, or raise an error
    about an internal class.

    Args:
        trainer: The Trainer's flags.
        cpu_offload: Whether weights are requested to stay in the memory of the CPU.

    Raises:
        UserError: A requested setting is not available on this machine; the message suggests an available one.
    """
    accelerator = _resolve_accelerator(str(trainer.get("accelerator")))
    _validate_device_count(accelerator, str(trainer.get("devices")))
    _validate_strategy(trainer.get("strategy"))
    _validate_precision(accelerator, str(trainer.get("precision")))
    if cpu_offload and accelerator != "cuda":
        raise UserError(
            f"cpu_offload is true, but --trainer.accelerator is {accelerator}, which has no memory of its own; set "
            "--cpu_offload false, or use an NVIDIA or AMD GPU"
        )


def _validate_strategy(strategy: object) -> None:
    name = f"--trainer.strategy {strategy if isinstance(strategy, str) else type(strategy).__name__}"
    if strategy in FSDP1_NAMES or isinstance(strategy, FSDPStrategy):
        raise UserError(
            f"{name} flattens weights into vectors, which breaks Muon, weight decay and gradient clipping; "
            "use --trainer.strategy fsdp2"
        )
    if isinstance(strategy, str) and re.fullmatch(r"(single_)?(xla|tpu)\w*", strategy):
        raise UserError(f"{name} is for TPUs, which are not supported; use --trainer.strategy auto")
    if str(strategy).startswith("deepspeed") or isinstance(strategy, DeepSpeedStrategy):
        raise UserError(f"{name} saves checkpoints in an unsupported format; use --trainer.strategy fsdp2")
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, ModelParallel):
        raise UserError(f"{name} saves checkpoints in an unsupported format; use fsdp2, tp or fsdp2_tp")


def _resolve_accelerator(requested: str) -> str:
    """Return the accelerator that a flag selects: ``cpu``, ``cuda`` or ``mps``; other names are returned unchanged."""
    if requested == "tpu":
        raise UserError("--trainer.accelerator tpu: TPUs are not supported; use --trainer.accelerator auto")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if requested in ("auto", "gpu") and (cuda or mps):
        return "cuda" if cuda else "mps"
    if (requested in ("gpu", "cuda") and not cuda) or (requested == "mps" and not mps):
        cpu_build = requested != "mps" and not (torch.version.cuda or torch.version.hip)
        detail = f", and torch {torch.__version__} is built without GPU support" if cpu_build else ""
        raise UserError(
            f"--trainer.accelerator {requested}: this machine has no such GPU{detail}; use --trainer.accelerator cpu"
        )
    return "cpu" if requested == "auto" else requested


def _validate_device_count(accelerator: str, devices: str) -> None:
    """Check that each process has its own GPU, or that at most ``MAX_CPU_PROCESSES`` processes share the CPU."""
    if accelerator == "cpu" and devices.isdecimal() and int(devices) > MAX_CPU_PROCESSES:
        raise UserError(
            f"--trainer.devices {devices[:20]} exceeds the number of processes that can share a CPU "
            f"(at most {MAX_CPU_PROCESSES}); use fewer devices"
        )
    available = {"cuda": torch.cuda.device_count(), "mps": 1}.get(accelerator)
    if available is not None and devices.isdecimal() and int(devices) > available:
        raise UserError(
            f"--trainer.devices {devices} exceeds the number of GPUs of this machine ({available}); "
            f"use --trainer.devices {available}"
        )


def _validate_precision(accelerator: str, precision: str) -> None:
    reason = instead = None
    if precision.startswith("transformer-engine"):
        if accelerator != "cuda":
            reason, instead = "it requires an NVIDIA GPU", "bf16-mixed"
        elif importlib.util.find_spec("transformer_engine") is None:
            reason, instead = "the library transformer_engine is not installed", "bf16-mixed"
    elif accelerator == "cpu" and re.fullmatch(r"16(-mixed|-true)?", precision):
        reason, instead = "gradients overflow in float16 on a CPU", "bf16-mixed"
    elif accelerator == "mps" and precision.startswith("64"):
        reason, instead = "Apple's GPUs do not support float64", "32-true"
    elif accelerator == "cuda" and precision.startswith("bf16") and default_precision("cuda").value == "16-mixed":
        reason, instead = "this GPU does not support bfloat16", "16-mixed"
    if reason:
        raise UserError(f"--trainer.precision {precision}: {reason}; use --trainer.precision {instead}")


def requested_devices(devices: str | int | list[int]) -> int | None:
    """Return the number of devices per node that ``--trainer.devices`` requests, or None if it requests all.

    Raises:
        UserError: The value is not a number, a list, -1 or ``auto``.
    """
    if isinstance(devices, str) and "," in devices:
        return sum(bool(index.strip()) for index in devices.split(","))
    if isinstance(devices, list):
        return len(devices)
    if devices in ("auto", "-1", -1):
        return None
    try:
        return int(devices)
    except ValueError:
        raise UserError(
            f"--trainer.devices is {devices}; use a number of devices, indices such as 0,1, or auto"
        ) from None


@contextmanager
def raise_memory_error() -> Iterator[None]:
    """Raise out-of-memory errors of PyTorch as ``MemoryError``."""
    try:
        yield
    except RuntimeError as error:  # accelerators and the CPU allocator raise it
        if not re.search(r"out of memory|can't allocate memory", str(error)):
            raise
        raise MemoryError(str(error)) from error


@contextmanager
def explain_out_of_memory(data: Any) -> Iterator[None]:
    """Replace an out-of-memory error with an error that suggests flags to reduce memory use.

    Args:
        data: The run's data module.

    Raises:
        UserError: There is not enough memory.
    """
    try:
        with raise_memory_error():
            yield
    except MemoryError as error:
        needed = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        raise UserError(
            f"out of memory{f' while allocating {needed[1]}' if needed else ''}; {_suggest_smaller_step(data)}"
        ) from error


def _suggest_smaller_step(data: Any) -> str:
    """Suggest flags that reduce memory use, if possible without changing the optimizer step."""
    layout = getattr(data, "layout", None)
    if not isinstance(layout, BatchLayout) or layout.batch_size == 1:
        return f"use {CHECKPOINTING_FLAG}, a smaller model or a smaller --data.block_size"
    own = layout.batch_size * layout.accumulate  # rows per rank
    fewer = next(n for n in range(layout.batch_size // 2, 0, -1) if own % n == 0)
    step = f"--data.tokens_per_step {layout.rows_per_step * data.block_size}"
    if data.tokens_per_step is None and layout.accumulate > 1:  # accumulation is set by the Trainer's flag
        step = f"--trainer.accumulate_grad_batches {own // fewer}"
    return f"use smaller micro-batches for the same step: --data.batch_size {fewer} {step}; or {CHECKPOINTING_FLAG}"
