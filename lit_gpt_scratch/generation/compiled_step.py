"""The step from one token to the next as one compiled program."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.attention import build_attention_layout
from lit_gpt_scratch.model.kv_cache import KVCache

DecodeStep = Callable[[Tensor, KVCache], Tensor]
MAX_FUSED_ELEMENTS: Final = 1 << 20
"""Numbers in a matrix beyond which the library's kernel is left to do it: it is the faster one in GPT-2 124M."""

aten = torch.ops.aten


def compile_decode_step(model: GPT, rows: int) -> DecodeStep:
    """Compile what is done with tensors: many seconds at the first call, and then no more.

    Args:
        model: In evaluation mode.
        rows: Of the batch.

    Returns:
        Ids (B, 1) and a fixed cache -> logits after them, (B, vocab_size).
    """

    def read(ids: Tensor, order: Any, cache: KVCache) -> Tensor:
        return model.apply_head(model.forward_blocks(ids, order, cache))[:, -1]

    on_cpu = model.embedding.weight.device.type == "cpu"
    program = torch.compile(read, dynamic=False, backend=_single_row_backend if rows == 1 and on_cpu else "inductor")

    def step(ids: Tensor, cache: KVCache) -> Tensor:
        cache.begin_forward(1)
        logits: Tensor = program(ids, build_attention_layout(model.config, model.position, ids, None, cache), cache)
        cache.end_forward()
        return logits

    return step


def _single_row_backend(graph: fx.GraphModule, examples: Sequence[Any]) -> Any:
    """Inductor, but a row times a matrix is a loop that it fuses with what stands around it.

    A processor spends such a product on reading the matrix; in a small model the call of a library's kernel costs time
    visibly beside that.
    """
    from torch._inductor.compile_fx import compile_fx  # two seconds, for those alone who compile
    from torch._inductor.decomposition import select_decomp_table

    decompositions: dict[Any, Callable[..., Any]] = {
        **select_decomp_table(),
        aten.mm.default: _mm,
        aten.addmm.default: _addmm,
    }
    return compile_fx(graph, list(examples), decompositions=decompositions)


def _mm(row: Tensor, matrix: Tensor) -> Tensor:
    """row: (1, K), matrix: (K, N) -> (1, N); as a compiler's rule, it may leave the product to others."""
    if row.size(0) != 1 or matrix.numel() > MAX_FUSED_ELEMENTS:
        return NotImplemented  # type: ignore[no-any-return]  # what such a rule answers then
    exact = torch.promote_types(row.dtype, torch.float32)
    return (matrix.t().to(exact) * row.to(exact)).sum(-1, keepdim=True).t().to(row.dtype)


def _addmm(bias: Tensor, row: Tensor, matrix: Tensor) -> Tensor:
    """bias: (N,), row: (1, K), matrix: (K, N) -> (1, N)."""
    product = _mm(row, matrix)
    return product if product is NotImplemented else product + bias
