"""The most operations a second that a device can do, to hold a model's own against."""

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
}
"""Dense TFLOP/s of products in bfloat16 or float16, summed in float32, by pattern of the GPU's name, from NVIDIA's data
sheets.

Where a sheet names only the figure with structured sparsity this is half of it. Lightning's and PyTorch's tables mix
the two kinds, and know neither an H200 nor an L40S by the name that its driver gives.
"""
FLOAT16_ONLY_TFLOPS = {"V100-SXM2": 125, "V100-SXM3": 125, "V100-PCIE": 112, "T4": 65}
"""The same of GPUs whose tensor cores do not know bfloat16."""

MAX_MATRIX_SIZE = 8192
MIN_SECONDS = 0.005
"""Seconds of a product from which on a larger one would be no faster."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations a second: ``nominal`` (the data sheet's) if it is known, and ``measured``.

    A data sheet's figure is what the literature's utilisations are of. No product reaches it: clocks fall under
    load. The measured one is what this device reaches in its best square product, the bar that a program can meet.

    Args:
        device: The one to ask about; measuring keeps it busy for some tenths of a second, once a process.
        dtype: Of the factors.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    nominal = lookup_nominal_flops(name, dtype)
    measured = measure_flops(device, dtype, torch.get_float32_matmul_precision())
    return {**({"nominal": nominal} if nominal else {}), "measured": measured}


def lookup_nominal_flops(name: str, dtype: torch.dtype) -> float | None:
    """The data sheet's dense operations a second for a GPU of this name, or None."""
    tables = {torch.bfloat16: TENSOR_CORE_TFLOPS, torch.float16: TENSOR_CORE_TFLOPS | FLOAT16_ONLY_TFLOPS}
    if "MIG" in name:  # a slice of the GPU
        return None
    known = (tera for chip, tera in tables.get(dtype, {}).items() if re.search(rf"\b{chip}\b", name))
    return next((1e12 * tera for tera in known), None)


@cache
def measure_flops(device: torch.device, dtype: torch.dtype, float32_precision: str) -> float:
    """Operations a second in the best of several square products, of growing size.

    Args:
        device: Where.
        dtype: Of the factors.
        float32_precision: PyTorch's setting, part of what is measured where factors are float32.
    """
    best, seconds, n = 0.0, 0.0, 128
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers are not touched
    while seconds < MIN_SECONDS and n < MAX_MATRIX_SIZE:
        n *= 2
        row, column = torch.randn(2, n, device=device, generator=generator)
        factor = torch.outer(row, column).to(dtype)  # a fraction of the time of n * n random numbers
        tries = 3 if device.type == "cpu" else 4  # where products take long, and where the first ones warm up
        seconds = min(_time_matmul(factor) for _ in range(tries))
        best = max(best, 2 * n**3 / seconds)
    return best


def _time_matmul(factor: torch.Tensor) -> float:
    began = time.perf_counter()
    linear(factor, factor)
    if factor.device.type != "cpu":
        torch.accelerator.synchronize(factor.device)
    return time.perf_counter() - began
