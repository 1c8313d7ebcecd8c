"""Rows about generation: tokens per second for one row and many rows, with the eager and the compiled step."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch._dynamo.utils import counters

from lit_gpt_scratch.acceptance.row import RowContext, RowFailed, Values
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.model import GPT, GPTConfig

GREEDY: Final = Sampling(temperature=0.0)


def measure_decoding(
    context: RowContext,
    config: GPTConfig,
    vocab_size: int,
    block_size: int,
    rows: Sequence[int],
    new_tokens: int,
    compile: bool,
    cuda_graphs: bool = False,
) -> Iterator[Values]:
    """Yield the number of tokens per second for each number of rows, in bfloat16 with random weights.

    Args:
        context: Where the row runs.
        config: Architecture.
        vocab_size: Number of token ids.
        block_size: Context length in tokens.
        rows: Numbers of rows that are decoded at the same time.
        new_tokens: Tokens per row.
        compile: Whether the decoding step is compiled; compilation is not counted.
        cuda_graphs: Whether Inductor replays the step as a CUDA graph; yields how often it could not.

    Raises:
        RowFailed: A step was not replayed as a CUDA graph, although it should have been.
    """
    skipped_before = counters["inductor"]["cudagraph_skips"]
    torch.manual_seed(0)
    net = GPT(config, vocab_size, block_size).to(context.device, torch.bfloat16).eval()
    yield {"weights MB": sum(p.nbytes for p in net.parameters()) / 1e6}
    with _inductor_settings({"triton.cudagraphs": True}) if cuda_graphs else nullcontext():
        for n in rows:
            began = time.perf_counter()
            _decode(net, n, new_tokens, compile)
            context.synchronize()
            first = time.perf_counter() - began
            began = time.perf_counter()
            count = _decode(net, n, new_tokens, compile)
            context.synchronize()
            seconds = time.perf_counter() - began
            streams = "1 stream" if n == 1 else f"{n} streams"
            yield {f"tokens/s, {streams}": count / seconds, f"first call s, {streams}": first}
    if cuda_graphs:
        skipped = counters["inductor"]["cudagraph_skips"] - skipped_before
        yield {"skipped CUDA graphs": skipped}
        if skipped:
            raise RowFailed("a decoding step was not replayed as a CUDA graph; the log states the reason")


def _inductor_settings(settings: dict[str, Any]) -> AbstractContextManager[None]:
    from torch._inductor import config  # takes seconds to import

    patched: AbstractContextManager[None] = config.patch(settings)
    return patched


def _decode(net: GPT, rows: int, new_tokens: int, compile: bool) -> int:
    """Generate from prompts of one token; return the number of generated tokens."""
    found = generate(net, [[1]] * rows, new_tokens, GREEDY, [0] * rows, end_of_text=-1, compile=compile)
    return sum(token is not None for _, token in found)
