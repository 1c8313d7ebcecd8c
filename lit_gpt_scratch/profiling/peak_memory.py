"""Measure the peak memory usage of a run."""

import sys

import torch

if sys.platform != "win32":
    import resource


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory usage of this process in bytes, or None if it is not available.

    On a CUDA device, it is the peak memory occupied by tensors since the statistics were last reset. On a CPU, it is
    the peak resident set size of the process since it started.

    Args:
        device: The device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
