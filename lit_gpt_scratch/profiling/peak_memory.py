"""How much memory a run needed."""

import sys

import torch

if sys.platform != "win32":
    import resource


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that were in use at once, or None where nobody keeps count.

    Args:
        device: On a CUDA device the tensors of this process, since training began; on a CPU the whole process
            (its resident set), since it started.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
