"""Speed of decoding, on a simulated clock."""

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from lit_gpt_scratch.acceptance import decoding_rows
from lit_gpt_scratch.acceptance.decoding_rows import measure_decoding
from lit_gpt_scratch.acceptance.row import RowFailed, Values
from lit_gpt_scratch.generation import decode_loop
from lit_gpt_scratch.kernels.compiler_backend import CompilerBackend
from lit_gpt_scratch.model import GPT, GPTConfig
from tests.acceptance.simulated_gpu import context_in

TINY = GPTConfig(n_layer=1, n_head=2, n_embd=32)


def measure(folder: Path, **sizes: Any) -> Values:
    values: Values = {}
    given = {"vocab_size": 97, "block_size": 32, "rows": (1, 3), "new_tokens": 6, "compile": False, **sizes}
    for found in measure_decoding(context_in(folder), TINY, **given):
        values |= found
    return values


def test_tokens_per_second_of_the_second_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call takes ten seconds, the second two; each generates six tokens per row."""
    now, generate, calls = [0.0], decoding_rows.generate, []

    def timed(*args: Any, **options: Any) -> Any:
        calls.append(options["compile"])
        now[0] += 10 if len(calls) % 2 else 2
        return generate(*args, **{**options, "compile": False})

    monkeypatch.setattr(decoding_rows.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(decoding_rows, "generate", timed)
    values = measure(tmp_path, compile=True)
    assert values["tokens/s, 1 stream"] == 3
    assert values["tokens/s, 3 streams"] == 9
    assert values["first call s, 3 streams"] == 10
    assert calls == [True] * 4


@pytest.mark.parametrize("skipped", [0, 2])
def test_skipped_cuda_graphs_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: int) -> None:
    """Those of earlier compilations in the same process do not count."""
    from torch._inductor import config

    generate, before, seen = decoding_rows.generate, config.triton.cudagraphs, []

    def skip(*args: Any, **options: Any) -> Any:
        seen.append(config.triton.cudagraphs)
        counters["inductor"]["cudagraph_skips"] += skipped
        return generate(*args, **options)

    monkeypatch.setattr(decoding_rows, "generate", skip)
    counters["inductor"]["cudagraph_skips"] += 3
    found = decoding_rows.measure_decoding(context_in(tmp_path), TINY, 97, 32, [1], 6, compile=False, cuda_graphs=True)
    values: Values = {}
    reason = ""
    try:
        for each in found:
            values |= each
    except RowFailed as failure:
        reason = str(failure)
    assert ("not replayed" in reason) == bool(skipped)
    assert values["skipped CUDA graphs"] == 2 * skipped
    assert seen == [True, True]
    assert config.triton.cudagraphs == before


def test_keys_and_values_are_static_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler sees that the step may modify them in place in a CUDA graph, and no other input is modified."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(decode_loop, "_inductor", CompilerBackend(required=True, compile=keep))
    net = GPT(TINY, 97, 32).eval()
    tokens = list(decode_loop.generate(net, [[1], [2]], 5, decoding_rows.GREEDY, [0, 0], -1, compile=True))
    eager = list(decode_loop.generate(net, [[1], [2]], 5, decoding_rows.GREEDY, [0, 0], -1))
    assert tokens == eager
    [graph] = graphs  # compiled once
    placeholders = graph.graph.find_nodes(op="placeholder")
    static = {n for n in placeholders if n.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")}
    parameters = {n for n in placeholders if isinstance(n.meta["example_value"], torch.nn.Parameter)}
    assert len(static - parameters) == 2 * TINY.n_layer
    modified = {n.args[0] for n in graph.graph.nodes if n.target in ("index_copy_", operator.setitem)}
    assert modified == static - parameters


def test_weights_are_in_bfloat16(tmp_path: Path) -> None:
    n = sum(p.numel() for p in GPT(TINY, 97, 32).parameters())
    assert measure(tmp_path)["weights MB"] == pytest.approx(2 * n / 1e6)
