"""What this machine can do, where a default depends on it."""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import torch
from torch.utils._triton import has_triton


def default_precision(accelerator: str) -> Literal["bf16-mixed", "16-mixed", "32-true"]:
    """Lightning's ``precision`` for this machine: bfloat16 where the hardware multiplies in it.

    Emulated bfloat16 is several times slower than float32, so it is only chosen where it is native:
    GPUs from Ampere on, processors with AMX or AVX512-BF16.

    Args:
        accelerator: Lightning's, ``auto`` included.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if native else "32-true"


def why_not_compile(device: torch.device) -> str | None:
    """None where ``torch.compile`` can work on a device, else the reason in a few words."""
    if sys.platform == "win32":
        return "torch.compile is not set up on Windows"
    if device.type not in ("cpu", "cuda"):
        return f"torch.compile is not mature on {device.type}"
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed, or does not know this GPU"
    compilers = {"cpu": ("CXX", ["g++", "clang++"]), "cuda": ("CC", ["cc", "gcc", "clang"])}
    variable, names = compilers[device.type]
    if variable in os.environ:
        names = shlex.split(os.environ[variable])[:1]
    if not any(map(shutil.which, names)):
        return f"no compiler ({' or '.join(names)}) is installed"
    headers = Path(sysconfig.get_path("include"), "Python.h")  # generated kernels include it
    return None if headers.is_file() else f"Python's headers are not installed ({headers} is missing)"
