"""What this machine can do, where a default depends on it."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._triton import has_triton

from lit_gpt_scratch.distributed.cpu_count import CGROUP_CPU_MAX, read_cgroup_cpu_quota

ONEDNN_CACHE_CAPACITY = 64
"""Matrix products whose code oneDNN keeps.

It writes code for every shape that it meets, and would keep 1,024: 1.6 GB more than without where rows are filled up to
the longest of their batch. A training step has some 40 shapes, and writing code anew costs less than 0.5 ms.
"""


class HardwareDefault(NamedTuple):
    """A default, and why it is that one."""

    value: str
    reason: str


def default_precision(accelerator: str) -> HardwareDefault:
    """Lightning's ``precision`` for this machine: bfloat16 where the hardware multiplies in it.

    Emulated bfloat16 is several times slower than float32, so it is only chosen where it is native:
    GPUs from Ampere on, processors with AMX or AVX512-BF16.

    Args:
        accelerator: Lightning's, ``auto`` included.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return HardwareDefault("bf16-mixed", "this GPU multiplies in bfloat16")
        return HardwareDefault("16-mixed", "this GPU has float16, but no bfloat16")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return HardwareDefault("32-true", "mixed precision has not been measured on Apple's GPUs")
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return HardwareDefault("bf16-mixed", "this processor multiplies in bfloat16")
    return HardwareDefault("32-true", "torch finds no bfloat16 in this processor")


def configure_process(processes: int = 1) -> None:
    """What a process does before it computes anything; arguments as for ``limit_threads``."""
    limit_threads(processes)
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # the library's, and PyTorch's above it
        os.environ.setdefault(variable, str(ONEDNN_CACHE_CAPACITY))


def limit_threads(processes: int = 1, quota: Path = CGROUP_CPU_MAX) -> None:
    """Let torch start no more threads than a container's quota has cores for.

    Torch and Lightning count the machine's cores; in a container with a share of them the threads would wait for
    each other. ``OMP_NUM_THREADS`` goes before; for processes that are yet to be started it is set.

    Args:
        processes: Those of this run on this machine, which share the cores.
        quota: See ``read_cgroup_cpu_quota``; on a system without one nothing changes.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    allowed = read_cgroup_cpu_quota(quota)
    if allowed is not None:
        torch.set_num_threads(min(max(1, allowed // processes), torch.get_num_threads()))
        if processes > 1:
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def explain_no_compile(device: torch.device, requested: bool = False) -> str | None:
    """None where ``torch.compile`` can work on a device, else the reason in a few words.

    Args:
        device: Where the network runs.
        requested: The user wants it: then only what makes it impossible is a reason, not what makes it a poor default.
    """
    if sys.platform == "win32":
        return None if requested else "torch.compile is not set up on Windows"
    if device.type not in ("cpu", "cuda"):
        return None if requested else f"torch.compile is not mature on {device.type}"
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed, or does not know this GPU"
    # Those that Inductor and Triton look for; a variable names one program, without arguments.
    variable, names = {
        "cpu": ("CXX", ["clang++" if sys.platform == "darwin" else "g++"]),
        "cuda": ("CC", ["gcc", "clang"]),
    }[device.type]
    if variable in os.environ:
        names = [os.environ[variable]]
    if not any(map(shutil.which, names)):
        return f"no compiler ({' or '.join(names)}) is installed; {variable} can name another"
    headers = Path(sysconfig.get_path("include"), "Python.h")  # generated kernels include it
    return None if headers.is_file() else f"Python's headers are not installed ({headers} is missing)"
