"""Measured and nominal peak FLOP/s of a device, which are the reference for model FLOPs utilization."""

import re
import time
from functools import cache

import torch

from lit_gpt_scratch.kernels.onednn_linear import linear

TENSOR_CORE_TFLOPS = {
    "B200": 2250,
    "H200 NVL": 835,
    "H200$": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100 80GB HBM3": 989,
    "A100": 312,
    "A40": 150,
    "A30": 165,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 5090$": 209,
    "RTX 4090$": 165,
    "RTX 3090$": 71,
    "MI300X": 1307,
}
"""Dense TFLOP/s of bfloat16 and float16 matmuls with float32 accumulation, keyed by a regex for the GPU's name.

The values are from the data sheets of NVIDIA and AMD. If a data sheet lists only the value with structured sparsity,
half of it is used. The tables of Lightning and PyTorch are not used, because they mix dense and sparse values and do
not recognize an H200 or L40S by the name that the driver reports.
"""
FLOAT16_ONLY_TFLOPS = {"V100-SXM2": 125, "V100-SXM3": 125, "V100-PCIE": 112, "T4": 65}
"""Dense TFLOP/s of float16 matmuls on GPUs whose tensor cores do not support bfloat16."""

MAX_MATRIX_SIZE = 8192
MIN_SECONDS = 0.005
"""Matmul duration in seconds above which larger matrices no longer increase the measured FLOP/s."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return a device's peak FLOP/s: ``measured`` and, if known, ``nominal`` from the data sheet.

    Publications report utilization relative to the nominal value. No matmul reaches it, because clock rates drop under
    load. The measured value is the FLOP/s of the fastest square matmul, which real programs can reach.

    Args:
        device: The device to measure. The measurement takes a few tenths of a second and is cached.
        dtype: Dtype of the matrices.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    nominal = lookup_nominal_flops(name, dtype)
    measured = measure_flops(device, dtype, torch.get_float32_matmul_precision())
    return {**({"nominal": nominal} if nominal else {}), "measured": measured}


def lookup_nominal_flops(name: str, dtype: torch.dtype) -> float | None:
    """Return the dense FLOP/s of a GPU according to its data sheet, or None if the GPU or dtype is not listed."""
    tables = {torch.bfloat16: TENSOR_CORE_TFLOPS, torch.float16: TENSOR_CORE_TFLOPS | FLOAT16_ONLY_TFLOPS}
    if "MIG" in name:  # a partition of a GPU
        return None
    known = (tera for chip, tera in tables.get(dtype, {}).items() if re.search(rf"\b{chip}\b", name))
    return next((1e12 * tera for tera in known), None)


@cache
def measure_flops(device: torch.device, dtype: torch.dtype, float32_precision: str) -> float:
    """Measure the peak FLOP/s over square matmuls of increasing size.

    Args:
        device: The device.
        dtype: Dtype of the matrices.
        float32_precision: Value of ``torch.get_float32_matmul_precision()``, which affects float32 matmuls. It is only
            used as part of the cache key.
    """
    best, seconds, n = 0.0, 0.0, 128
    generator = torch.Generator(device).manual_seed(0)  # so that the global random state is unchanged
    while seconds < MIN_SECONDS and n < MAX_MATRIX_SIZE:
        n *= 2
        row, column = torch.randn(2, n, device=device, generator=generator)
        factor = torch.outer(row, column).to(dtype)  # much faster than sampling n * n random numbers
        tries = 3 if device.type == "cpu" else 4  # CPU matmuls are slow; on a GPU, the first matmuls are warm-up
        seconds = min(_time_matmul(factor) for _ in range(tries))
        best = max(best, 2 * n**3 / seconds)
    return best


def _time_matmul(factor: torch.Tensor) -> float:
    began = time.perf_counter()
    linear(factor, factor)
    if factor.device.type != "cpu":
        torch.accelerator.synchronize(factor.device)
    return time.perf_counter() - began
