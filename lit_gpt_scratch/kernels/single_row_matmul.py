"""A compiler backend for decoding one sequence on a CPU: (1, K) @ (K, N) as a fused loop.

A processor spends such a product on reading the matrix; in a small model the call of a library's matrix kernel adds a
visible cost to that. As an elementwise product and a sum, inductor fuses it with the operations around it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

MAX_MATRIX_NUMEL: Final = 1 << 20
"""Matrices with more elements are left to the library's kernel, which is faster at the sizes of GPT-2 124M."""

aten = torch.ops.aten


def single_row_backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    """Inductor with single-row matrix products decomposed; pass it as ``torch.compile(..., backend=)``."""
    from torch._inductor.compile_fx import compile_fx  # takes two seconds to import
    from torch._inductor.decomposition import select_decomp_table

    decompositions: dict[Any, Callable[..., Any]] = {
        **select_decomp_table(),
        aten.mm.default: _mm,
        aten.addmm.default: _addmm,
    }
    return compile_fx(graph, list(example_inputs), decompositions=decompositions)


def _mm(row: Tensor, matrix: Tensor) -> Tensor:
    """row: (1, K), matrix: (K, N) -> (1, N); accumulated in at least float32."""
    if row.size(0) != 1 or matrix.numel() > MAX_MATRIX_NUMEL:
        return NotImplemented  # type: ignore[no-any-return]  # keeps the original operator
    exact = torch.promote_types(row.dtype, torch.float32)
    return (matrix.t().to(exact) * row.to(exact)).sum(-1, keepdim=True).t().to(row.dtype)


def _addmm(bias: Tensor, row: Tensor, matrix: Tensor) -> Tensor:
    """bias: (N,), row: (1, K), matrix: (K, N) -> (1, N)."""
    product = _mm(row, matrix)
    return product if product is NotImplemented else product + bias
