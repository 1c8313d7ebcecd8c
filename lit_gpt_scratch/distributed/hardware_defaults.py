"""Hardware-dependent defaults: precision, number of threads, and whether to compile."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch.utils._triton import has_triton

from lit_gpt_scratch.distributed.cpu_count import CGROUP_CPU_MAX, read_cgroup_cpu_quota

ONEDNN_CACHE_CAPACITY = 64
"""Number of generated matmul kernels that oneDNN caches.

oneDNN generates a kernel for each shape, and caches 1,024 kernels by default. If each batch is padded to the length of
its longest row, the shapes vary, and the cached kernels use 1.6 GB of additional memory. A training step uses about 40
different shapes, and regenerating a kernel takes less than 0.5 ms.
"""
PRECISION_ALIASES: Final = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Names of precisions, keyed by short names that the Trainer also accepts."""


class HardwareDefault(NamedTuple):
    """A default value, with the reason for choosing it."""

    value: str
    reason: str


def default_precision(accelerator: str) -> HardwareDefault:
    """Return the default ``--trainer.precision`` for this machine: bfloat16 if the hardware supports it.

    Emulated bfloat16 is several times slower than float32, so bfloat16 is only chosen where it is native: on GPUs since
    Ampere, and on CPUs with AMX or AVX512-BF16.

    Args:
        accelerator: Lightning's name for the accelerator; may be ``auto``.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return HardwareDefault("bf16-mixed", "this GPU supports bfloat16")
        return HardwareDefault("16-mixed", "this GPU supports float16, but not bfloat16")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return HardwareDefault("32-true", "mixed precision has not been measured on Apple's GPUs")
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return HardwareDefault("bf16-mixed", "this CPU supports bfloat16")
    return HardwareDefault("32-true", "torch detects no bfloat16 support on this CPU")


def normalize_precision(precision: str | int) -> str:
    """Return the full name of a ``--trainer.precision``, such as ``bf16-mixed`` for ``bf16``."""
    return PRECISION_ALIASES.get(str(precision), str(precision))


def configure_process(processes: int = 1) -> None:
    """Set the number of threads and the oneDNN cache size. This must be called before the first computation.

    Args:
        processes: See ``limit_threads``.
    """
    limit_threads(processes)
    for variable in (
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "LRU_CACHE_CAPACITY",
    ):  # oneDNN's cache, and PyTorch's cache on top of it
        os.environ.setdefault(variable, str(ONEDNN_CACHE_CAPACITY))


def limit_threads(processes: int = 1, quota: Path = CGROUP_CPU_MAX) -> None:
    """Limit the number of PyTorch threads to the container's CPU quota.

    PyTorch and Lightning count all cores of the machine. In a container with a CPU quota, they would start too many
    threads, which would wait for each other. If ``OMP_NUM_THREADS`` is already set, nothing changes; otherwise it is
    set for child processes.

    Args:
        processes: Number of processes of this run on this machine, which share the cores.
        quota: Path to the cgroup's CPU limit; see ``read_cgroup_cpu_quota``. Without a quota, nothing changes.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    allowed = read_cgroup_cpu_quota(quota)
    if allowed is not None:
        torch.set_num_threads(min(max(1, allowed // processes), torch.get_num_threads()))
        if processes > 1:
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def explain_no_compile(device: torch.device, requested: bool = False) -> str | None:
    """Return the reason why ``torch.compile`` is not used on a device, or None if it is used.

    Args:
        device: The network's device.
        requested: Whether the user requested compilation explicitly. If so, only reasons that make compilation
            impossible are returned, and not reasons to disable it by default.
    """
    if sys.platform == "win32":
        return None if requested else "torch.compile requires additional setup on Windows"
    if device.type not in ("cpu", "cuda"):
        return None if requested else f"torch.compile is not mature on {device.type}"
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed, or does not support this GPU"
    # Compilers that Inductor and Triton look for. The environment variable names a program, without arguments.
    variable, names = {
        "cpu": ("CXX", ["clang++" if sys.platform == "darwin" else "g++"]),
        "cuda": ("CC", ["gcc", "clang"]),
    }[device.type]
    if variable in os.environ:
        names = [os.environ[variable]]
    if not any(map(shutil.which, names)):
        return f"no compiler ({' or '.join(names)}) is installed; set {variable} to an installed compiler"
    headers = Path(sysconfig.get_path("include"), "Python.h")  # generated kernels include this header
    return None if headers.is_file() else f"Python's headers are not installed ({headers} is missing)"
