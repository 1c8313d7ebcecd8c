"""Peak memory of a run."""

import sys

import torch

if sys.platform != "win32":
    import resource


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes, or None if it is not available.

    Args:
        device: For CUDA, tensors of this process since training began; for the CPU, the resident set of the whole
            process since it started.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
