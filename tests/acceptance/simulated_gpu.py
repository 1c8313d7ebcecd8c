"""A context that takes the CUDA paths of a row, but computes on the CPU."""

from pathlib import Path

import torch

from lit_gpt_scratch.acceptance.row import RowContext


class SimulatedGPU(RowContext):
    """Claims to be a CUDA GPU, with tensors on the CPU; tests replace the functions of ``torch.cuda`` in use."""

    @property
    def on_cuda(self) -> bool:
        return True


def context_in(folder: Path) -> RowContext:
    """A context on the CPU."""
    return RowContext(torch.device("cpu"), folder, folder)
