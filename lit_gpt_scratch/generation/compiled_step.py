"""The step from one token to the next as one compiled program."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_gpt_scratch.kernels.single_row_matmul import single_row_backend
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.attention import build_attention_layout
from lit_gpt_scratch.model.kv_cache import KVCache

DecodeStep = Callable[[Tensor, KVCache], Tensor]


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
    program = torch.compile(read, dynamic=False, backend=single_row_backend if rows == 1 and on_cpu else "inductor")

    def step(ids: Tensor, cache: KVCache) -> Tensor:
        cache.begin_forward(1)
        logits: Tensor = program(ids, build_attention_layout(model.config, model.position, ids, None, cache), cache)
        cache.end_forward()
        return logits

    return step
