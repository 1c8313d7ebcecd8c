"""A ``torch.compile`` backend that compiles (1, K) @ (K, N) matmuls into fused loops, to decode one sequence on a CPU.

Reading the matrix dominates the time of such a matmul, and in small models, calling a library's matrix kernel adds
noticeable overhead. The matmul is therefore written as an elementwise product and a sum, which Inductor fuses with the
surrounding operations.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

MAX_MATRIX_NUMEL: Final = 1 << 20
"""Maximum number of matrix elements; for larger matrices, such as those of GPT-2 124M, library kernels are faster."""

aten = torch.ops.aten


def single_row_backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    """Compile a graph with Inductor, decomposing single-row matmuls; a backend for ``torch.compile``."""
    from torch._inductor.compile_fx import compile_fx  # takes two seconds to import
    from torch._inductor.decomposition import select_decomp_table

    decompositions: dict[Any, Callable[..., Any]] = {
        **select_decomp_table(),
        aten.mm.default: _mm,
        aten.addmm.default: _addmm,
    }
    return compile_fx(graph, list(example_inputs), decompositions=decompositions)


def _mm(row: Tensor, matrix: Tensor) -> Tensor:
    """Multiply row (1, K) by matrix (K, N) -> (1, N), accumulating in at least float32."""
    if row.size(0) != 1 or matrix.numel() > MAX_MATRIX_NUMEL:
        return NotImplemented  # type: ignore[no-any-return]  # keeps the original operator
    exact = torch.promote_types(row.dtype, torch.float32)
    return (matrix.t().to(exact) * row.to(exact)).sum(-1, keepdim=True).t().to(row.dtype)


def _addmm(bias: Tensor, row: Tensor, matrix: Tensor) -> Tensor:
    """Multiply row (1, K) by matrix (K, N) and add bias (N,) -> (1, N)."""
    product = _mm(row, matrix)
    return product if product is NotImplemented else product + bias
