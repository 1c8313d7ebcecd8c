"""What this machine can do, where a default depends on it."""

import os
import shutil
import sys

import torch


def default_precision() -> str:
    """Lightning's ``precision`` for this machine: bfloat16 where the hardware multiplies in it.

    Emulated bfloat16 is several times slower than float32, so it is only chosen where it is native:
    GPUs from Ampere on, processors with AMX or AVX512-BF16.
    """
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if torch.backends.mps.is_available():
        return "32-true"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if native else "32-true"


def why_not_compile(device: torch.device) -> str | None:
    """None where ``torch.compile`` can work on a device, else the reason in a few words."""
    if sys.platform == "win32":
        return "torch.compile is not set up on Windows"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed, or does not know this GPU"
    if device.type == "cpu":
        wanted = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
        return None if any(map(shutil.which, wanted)) else f"no C++ compiler ({' or '.join(wanted)}) is installed"
    return f"torch.compile is not mature on {device.type}"
