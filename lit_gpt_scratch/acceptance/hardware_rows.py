"""Rows about the machine itself: versions, devices, peak throughput of matrix products, copy bandwidth."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from lit_gpt_scratch.acceptance.row import RowContext, RowSkipped, Values
from lit_gpt_scratch.profiling.device_check import describe_machine
from lit_gpt_scratch.profiling.peak_flops import peak_flops

NVIDIA_SMI_FIELDS: Final = (
    "name,driver_version,memory.total,memory.used,power.limit,clocks.max.sm,compute_mode,mig.mode.current"
)
PEAK_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WARMUP_CALLS: Final = 5
FP8_MIN_CAPABILITY: Final = (8, 9)
"""Compute capability of the first GPUs whose tensor cores multiply in fp8 (Ada)."""


def describe_hardware(context: RowContext) -> Iterator[Values]:
    """Yield the versions of the libraries, the devices, the compiler and the report of ``nvidia-smi``."""
    yield dict(describe_machine({"out": context.out}))
    if context.on_cuda:
        yield {
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # not annotated in torch
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]  # not annotated in torch
            "capability": ".".join(map(str, torch.cuda.get_device_capability(context.device))),
        }
    yield {"nvidia-smi": query_nvidia_smi()}


def query_nvidia_smi() -> str:
    """Return what ``nvidia-smi`` reports about each GPU, or why it reports nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "not installed"
    query = [program, f"--query-gpu={NVIDIA_SMI_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    return "; ".join(line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip())


def measure_peaks(context: RowContext, copy_bytes: int, fp8_size: int, repeats: int) -> Iterator[Values]:
    """Yield the measured peak TFLOP/s of matrix products in each dtype, and the bandwidth of copies on the device.

    A dtype that the device does not support yields the reason instead of a number.

    Args:
        context: Where the row runs.
        copy_bytes: Size of the copied tensor, several times as large as the caches.
        fp8_size: Rows and columns of the fp8 matrices; a multiple of 16.
        repeats: Number of timed calls.
    """
    for name, dtype in PEAK_DTYPES.items():
        try:
            peaks = peak_flops(context.device, dtype)
        except (RuntimeError, NotImplementedError) as error:
            yield {f"{name} TFLOP/s": f"failed: {str(error).splitlines()[0]}"}
            continue
        yield {f"{name} TFLOP/s": peaks["measured"] / 1e12}
        if "nominal" in peaks:
            yield {f"{name} of the data sheet": peaks["measured"] / peaks["nominal"]}
    for name, fast in {"fp8 TFLOP/s": False, "fp8 TFLOP/s, fast accumulation": True}.items():
        try:
            yield {name: measure_fp8_flops(context, fp8_size, repeats, fast) / 1e12}
        except (RowSkipped, RuntimeError, NotImplementedError) as error:
            yield {name: f"not measured: {str(error).splitlines()[0]}"}
    yield {"copy GB/s, read and written": measure_copy_bandwidth(context, copy_bytes, repeats) / 1e9}


def measure_fp8_flops(context: RowContext, size: int, repeats: int, fast_accumulation: bool = False) -> float:
    """Return the FLOP/s of a square product of float8_e4m3 matrices with a bfloat16 result.

    Args:
        context: Where the row runs.
        size: Rows and columns of the matrices.
        repeats: Number of timed calls.
        fast_accumulation: Whether tensor cores add in less than float32 precision, which reaches the highest rate.

    Raises:
        RowSkipped: The GPU does not multiply in fp8.
    """
    if context.on_cuda and torch.cuda.get_device_capability(context.device) < FP8_MIN_CAPABILITY:
        raise RowSkipped("this GPU has no fp8 tensor cores")
    a, b = (torch.randn(size, size, device=context.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=context.device)

    def multiply() -> Tensor:  # the second matrix must be column-major
        return torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast_accumulation
        )

    return float(2 * size**3 / time_calls(context, multiply, repeats))


def measure_copy_bandwidth(context: RowContext, n_bytes: int, repeats: int) -> float:
    """Return the bandwidth in bytes per second of a copy on the device, counting bytes read and bytes written."""
    source = torch.randint(256, (n_bytes,), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    return 2 * n_bytes / time_calls(context, lambda: target.copy_(source), repeats)


def time_calls(context: RowContext, call: Callable[[], Any], repeats: int) -> float:
    """Return the median duration of a call in seconds, after several calls that are not counted.

    The first call loads the kernel; the clock rate of a GPU rises during the following calls.
    """
    for _ in range(WARMUP_CALLS):
        call()
    context.synchronize()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        context.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
