"""Unavailable hardware is rejected with the flag that asks for it and one that works, on simulated machines."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy

from lit_gpt_scratch.batch_types import BatchLayout
from lit_gpt_scratch.distributed.validate_hardware import explain_out_of_memory, requested_devices, validate_hardware
from lit_gpt_scratch.errors import UserError


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Simulate a number of GPUs, with or without bfloat16, or an Apple GPU."""

    def build(gpus: int = 0, bf16: bool = True, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return build


def asked(**flags: object) -> dict[str, Any]:
    return {"accelerator": "auto", "devices": "auto", "strategy": "auto", "precision": "32-true"} | flags


@pytest.mark.parametrize(
    ("here", "flags", "instead"),
    [
        ({}, {"accelerator": "gpu"}, "--trainer.accelerator cpu"),
        ({}, {"accelerator": "cuda"}, "--trainer.accelerator cpu"),
        ({"mps": True}, {"accelerator": "cuda"}, "--trainer.accelerator cpu"),
        ({"gpus": 2}, {"accelerator": "mps"}, "--trainer.accelerator cpu"),
        ({"gpus": 2}, {"devices": 8}, "--trainer.devices 2"),
        ({}, {"accelerator": "cpu", "devices": 10**9}, "at most 1024"),
        ({"gpus": 2}, {"accelerator": "gpu", "devices": "3"}, "--trainer.devices 2"),
        ({"mps": True}, {"devices": 2}, "--trainer.devices 1"),
        ({}, {"strategy": "fsdp"}, "fsdp2"),
        ({"gpus": 1}, {"accelerator": "cpu", "strategy": "fsdp"}, "fsdp2"),
        ({"gpus": 8}, {"accelerator": "gpu", "devices": 8, "strategy": FSDPStrategy()}, "fsdp2"),
        ({}, {"strategy": ModelParallelStrategy()}, "fsdp2, tp or fsdp2_tp"),
        ({}, {"precision": "16-mixed"}, "--trainer.precision bf16-mixed"),
        ({}, {"precision": "16-true"}, "--trainer.precision bf16-mixed"),
        ({}, {"precision": 16}, "--trainer.precision bf16-mixed"),
        ({}, {"precision": "transformer-engine"}, "--trainer.precision bf16-mixed"),
        ({"gpus": 1}, {"precision": "transformer-engine-float16"}, "transformer_engine is not installed"),
        ({"gpus": 1, "bf16": False}, {"precision": "bf16-mixed"}, "--trainer.precision 16-mixed"),
        ({"mps": True}, {"precision": "64-true"}, "--trainer.precision 32-true"),
    ],
)
def test_unavailable_hardware(
    machine: Callable[..., None], here: dict[str, Any], flags: dict[str, Any], instead: str
) -> None:
    machine(**here)
    with pytest.raises(UserError) as error:
        validate_hardware(asked(**flags))
    assert instead in str(error.value)
    name, value = list(flags.items())[-1]
    flag_value = type(value).__name__ if isinstance(value, Strategy) else value
    assert f"--trainer.{name} {flag_value}" in str(error.value)


@pytest.mark.parametrize(
    ("here", "flags"),
    [
        ({}, {}),
        ({}, {"accelerator": "cpu", "devices": 64, "strategy": "ddp", "precision": "bf16-mixed"}),
        ({"gpus": 8}, {"accelerator": "gpu", "devices": 8, "strategy": "fsdp2", "precision": "bf16-mixed"}),
        ({"gpus": 8}, {"devices": "0,3"}),
        ({"gpus": 1, "bf16": False}, {"precision": "16-mixed"}),
        ({"gpus": 1, "bf16": False}, {"accelerator": "cpu", "precision": "bf16-mixed"}),
        ({"mps": True}, {"accelerator": "gpu", "devices": 1, "precision": "16-mixed"}),
        ({"gpus": 1}, {"strategy": object(), "accelerator": object()}),
    ],
)
def test_available_hardware(machine: Callable[..., None], here: dict[str, Any], flags: dict[str, Any]) -> None:
    machine(**here)
    validate_hardware(asked(**flags))


@pytest.mark.parametrize(
    ("here", "flags", "message"),
    [
        ({}, {}, "--trainer.accelerator is cpu, which has no memory of its own"),
        ({"mps": True}, {}, "--trainer.accelerator is mps, which has no memory of its own"),
    ],
)
def test_cpu_offload_requires_a_gpu(
    machine: Callable[..., None], here: dict[str, Any], flags: dict[str, Any], message: str
) -> None:
    machine(**here)
    with pytest.raises(UserError, match=message):
        validate_hardware(asked(**flags), cpu_offload=True)
    machine(gpus=2)
    validate_hardware(asked(precision="bf16-mixed"), cpu_offload=True)


class Data:
    """The part of a data module that is read."""

    def __init__(self, layout: BatchLayout, tokens_per_step: int | None = None) -> None:
        self.layout, self.tokens_per_step, self.block_size = layout, tokens_per_step, 256


CPU = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 4 GiB")


@pytest.mark.parametrize(
    ("error", "data", "message"),
    [
        (
            CUDA,
            Data(BatchLayout(8, 1, 1)),
            "while allocating 2.50 GiB; use smaller micro-batches for the same step: --data.batch_size 4 ",
        ),
        (RuntimeError(CPU), Data(BatchLayout(8, 2, 4)), "while allocating 64 bytes"),
        (CUDA, Data(BatchLayout(8, 2, 1)), "--data.batch_size 4 --data.tokens_per_step 4096; or --model.activation_ch"),
        (CUDA, Data(BatchLayout(8, 2, 4)), "--data.batch_size 4 --trainer.accumulate_grad_batches 8;"),
        (CUDA, Data(BatchLayout(9, 1, 1)), "--data.batch_size 3 --data.tokens_per_step 2304"),
        (CUDA, Data(BatchLayout(12, 8, 5), 491520), "--data.batch_size 6 --data.tokens_per_step"),
        (CUDA, Data(BatchLayout(1, 1, 1)), "a smaller model or a smaller --data.block_size"),
        (MemoryError(), None, "a smaller model"),
    ],
)
def test_out_of_memory_suggests_smaller_micro_batches(error: Exception, data: Data | None, message: str) -> None:
    with pytest.raises(UserError, match=r"^out of memory") as error_info, explain_out_of_memory(data):
        raise error
    assert message in str(error_info.value)


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match="singular"), explain_out_of_memory(None):
        raise RuntimeError("the matrix is singular")


@pytest.mark.parametrize(
    ("devices", "n"),
    [("auto", None), (-1, None), ("-1", None), (2, 2), ("2", 2), ([0], 1), ([1, 3], 2), ("0,1", 2), ("3,", 1)],
)
def test_requested_devices(devices: Any, n: int | None) -> None:
    assert requested_devices(devices) == n


def test_invalid_devices() -> None:
    with pytest.raises(UserError, match=r"^--trainer.devices is two; use a number of devices, indices such as 0,1, or"):
        requested_devices("two")
