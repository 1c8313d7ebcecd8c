"""Compare the backward pass of attention on a CPU in PyTorch and in `lit_gpt_scratch.kernels.cpu_attention`.

    python experiments/benchmarks/attention.py

Times are in milliseconds, the minimum of many alternating calls. The forward passes are identical and are not
measured.
"""

import os
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gpt_scratch.kernels.cpu_attention import attention_backward, attention_forward

CALLS = 30
SHAPES = [(32, 4, 64, 32), (16, 3, 128, 64), (8, 3, 256, 64), (8, 6, 256, 64), (4, 3, 512, 64), (2, 3, 1024, 64)]
"""Shapes of queries, keys and values, (B, n_head, T, head_dim)."""


def timed(call: Callable[[], object]) -> float:
    """Return the duration of one call in milliseconds."""
    began = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    """Measure every shape in both dtypes and print a table."""
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'(B, n_head, T, head_dim)':26} {'type':10} {'torch':>8} {'ours':>8} {'times as fast':>14}")
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            q, k, v, grad = (torch.randn(shape, dtype=dtype) for _ in range(4))
            leaves = [x.requires_grad_() for x in (q, k, v)]
            theirs, ours = [], []
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
            saved = [x.detach() for x in (*leaves, *attention_forward(*leaves, None))]

            def by_torch(out: Tensor = out, leaves: list[Tensor] = leaves, grad: Tensor = grad) -> object:
                return torch.autograd.grad(out, leaves, grad, retain_graph=True)

            def by_hand(saved: list[Tensor] = saved, grad: Tensor = grad) -> object:
                return attention_backward(grad, *saved[:3], None, *saved[3:])

            for _ in range(CALLS):
                theirs.append(timed(by_torch))
                ours.append(timed(by_hand))
            ratio = min(theirs) / min(ours)
            print(f"{shape!s:26} {str(dtype)[6:]:10} {min(theirs):8.2f} {min(ours):8.2f} {ratio:14.2f}", flush=True)


if __name__ == "__main__":
    main()
