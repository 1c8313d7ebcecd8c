"""Hardware that is asked for and not there, and what would do instead: read off the flags, before anything is built."""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lit_gpt_scratch.batch_types import BatchLayout
from lit_gpt_scratch.distributed.hardware_defaults import default_precision
from lit_gpt_scratch.distributed.strategies import ModelParallel
from lit_gpt_scratch.errors import UserError

FSDP1_NAMES: Final = ("fsdp", "fsdp_cpu_offload")
"""Lightning's names for the first FSDP."""
CHECKPOINTING_FLAG: Final = "--model.activation_checkpointing true"


def validate_hardware(trainer: Mapping[str, Any]) -> None:
    """Compare what a trainer is asked to run on with this machine.

    Lightning would take another precision in silence, train to NaN, or name a class of its own.

    Args:
        trainer: The trainer's flags.

    Raises:
        UserError: This machine does not have it; what it has is named.
    """
    asked = {name: trainer.get(name) for name in ("accelerator", "devices", "strategy", "precision")}
    accelerator = _resolve_accelerator(str(asked["accelerator"]))
    _validate_device_count(accelerator, str(asked["devices"]))
    _validate_strategy(trainer.get("strategy"))
    _validate_precision(accelerator, str(asked["precision"]))


def _validate_strategy(asked: object) -> None:
    name = f"--trainer.strategy {asked if isinstance(asked, str) else type(asked).__name__}"
    if asked in FSDP1_NAMES or isinstance(asked, FSDPStrategy):
        raise UserError(
            f"{name} flattens weights into vectors, which Muon, weight decay and clipping take for "
            "something else; fsdp2 leaves them as they are: --trainer.strategy fsdp2"
        )
    if isinstance(asked, ModelParallelStrategy) and not isinstance(asked, ModelParallel):
        raise UserError(f"{name} writes checkpoints that nothing here reads; choose fsdp2, tp or fsdp2_tp")


def _resolve_accelerator(asked: str) -> str:
    """What an accelerator's name means here: ``cpu``, ``cuda``, ``mps``, or one that this module knows nothing of."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if asked in ("auto", "gpu") and (cuda or mps):
        return "cuda" if cuda else "mps"
    if (asked in ("gpu", "cuda") and not cuda) or (asked == "mps" and not mps):
        why = (
            ""
            if asked == "mps" or torch.version.cuda or torch.version.hip
            else f", and torch {torch.__version__} for none"
        )
        raise UserError(
            f"--trainer.accelerator {asked}: this machine has no such GPU{why}; --trainer.accelerator cpu works"
        )
    return "cpu" if asked == "auto" else asked


def _validate_device_count(accelerator: str, devices: str) -> None:
    """A processor can be shared by any number of processes, a GPU is for one."""
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(accelerator)
    if there is not None and devices.isdecimal() and int(devices) > there:
        raise UserError(f"--trainer.devices {devices}: this machine has {there}; --trainer.devices {there} works")


def _validate_precision(accelerator: str, precision: str) -> None:
    why_not = instead = None
    if precision.startswith("transformer-engine"):
        if accelerator != "cuda":
            why_not, instead = "it is for NVIDIA's GPUs", "bf16-mixed"
        elif importlib.util.find_spec("transformer_engine") is None:
            why_not, instead = "the library transformer_engine is not installed", "bf16-mixed"
    elif accelerator == "cpu" and re.fullmatch(r"16(-mixed|-true)?", precision):
        why_not, instead = "a processor's gradients overflow in float16", "bf16-mixed"
    elif accelerator == "mps" and precision.startswith("64"):
        why_not, instead = "Apple's GPUs have no float64", "32-true"
    elif accelerator == "cuda" and precision.startswith("bf16") and default_precision("cuda").value == "16-mixed":
        why_not, instead = "this GPU has no bfloat16", "16-mixed"
    if why_not:
        raise UserError(f"--trainer.precision {precision}: {why_not}; --trainer.precision {instead} works")


@contextmanager
def explain_out_of_memory(data: Any) -> Iterator[None]:
    """Say what would need less memory when there is not enough.

    Args:
        data: The data module of the run.

    Raises:
        UserError: There was not.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # of accelerators, and of the processor's allocator
        if not isinstance(error, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(error)):
            raise
        needed = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        raise UserError(
            f"out of memory{f' for {needed[1]} more' if needed else ''}; {_suggest_smaller_step(data)}"
        ) from error


def _suggest_smaller_step(data: Any) -> str:
    """Flags by which the same optimizer step needs less memory."""
    layout = getattr(data, "layout", None)
    if not isinstance(layout, BatchLayout) or layout.batch_size == 1:
        return f"{CHECKPOINTING_FLAG}, a smaller model or a smaller --data.block_size needs less"
    own = layout.batch_size * layout.accumulate  # windows of a rank
    fewer = next(n for n in range(layout.batch_size // 2, 0, -1) if own % n == 0)
    step = f"--data.tokens_per_step {layout.rows_per_step * data.block_size}"
    if data.tokens_per_step is None and layout.accumulate > 1:  # then the trainer was given its number
        step = f"--trainer.accumulate_grad_batches {own // fewer}"
    return f"the same step in smaller parts: --data.batch_size {fewer} {step}; or {CHECKPOINTING_FLAG}"
