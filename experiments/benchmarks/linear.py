"""Compare float32 linear layers on a CPU in PyTorch, which uses MKL on x86, and in `kernels.onednn_linear`.

    python experiments/benchmarks/linear.py

Times are in milliseconds for a forward and a backward pass, the minimum of many alternating calls. The benchmark
calls oneDNN for every shape and on every processor; the last column shows whether a model would call it.
"""

import os
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gpt_scratch.kernels.onednn_linear import MIN_MULTIPLICATIONS, USE_ONEDNN, _Linear

CALLS = 60
SHAPES = [
    (32, 128, 128), (128, 128, 128), (256, 128, 128), (768, 128, 128), (768, 128, 512), (768, 512, 128),
    (768, 128, 4096), (1024, 384, 384), (1024, 384, 1536), (1024, 1536, 384), (1024, 384, 4096), (1024, 768, 3072),
]  # fmt: skip
"""Shapes of the layers, (B * T, in_features, out_features)."""


def timed(layer: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> float:
    """Return the milliseconds of a forward and a backward pass, including the storage of gradients in ``grad``."""
    for leaf in inputs:
        leaf.grad = None
    began = time.perf_counter()
    layer(*inputs).backward(grad)
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    """Measure every shape and print a table."""
    name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", platform.machine())
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'(B * T, in, out)':20} {'torch':>8} {'oneDNN':>8} {'times as fast':>14}  called")
    for rows, width, out in SHAPES:
        inputs = [torch.randn(*shape, requires_grad=True) for shape in ((rows, width), (out, width), (out,))]
        grad = torch.randn(rows, out)
        theirs, ours = [], []
        for _ in range(CALLS):
            theirs.append(timed(F.linear, inputs, grad))
            ours.append(timed(_Linear.apply, inputs, grad))
        called = "yes" if USE_ONEDNN and rows * width * out >= MIN_MULTIPLICATIONS else "no"
        ratio = min(theirs) / min(ours)
        print(f"{(rows, width, out)!s:20} {min(theirs):8.3f} {min(ours):8.3f} {ratio:14.2f}  {called}", flush=True)


if __name__ == "__main__":
    main()
