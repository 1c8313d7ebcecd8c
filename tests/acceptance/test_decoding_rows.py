"""Speed of decoding, on a simulated clock."""

from pathlib import Path
from typing import Any

import pytest

from lit_gpt_scratch.acceptance import decoding_rows
from lit_gpt_scratch.acceptance.decoding_rows import measure_decoding
from lit_gpt_scratch.acceptance.row import Values
from lit_gpt_scratch.model import GPTConfig
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


def test_cuda_graphs_are_enabled_while_the_row_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    seen, generate = [], decoding_rows.generate

    def look(*args: Any, **options: Any) -> Any:
        seen.append(config.triton.cudagraphs)
        return generate(*args, **options)

    monkeypatch.setattr(decoding_rows, "generate", look)
    before = config.triton.cudagraphs
    values = measure(tmp_path, cuda_graphs=True)
    assert seen == [True] * 4
    assert config.triton.cudagraphs == before
    assert values["skipped CUDA graphs"] == 0
    assert "skipped CUDA graphs" not in measure(tmp_path)


def test_weights_are_in_bfloat16(tmp_path: Path) -> None:
    from lit_gpt_scratch.model import GPT

    n = sum(p.numel() for p in GPT(TINY, 97, 32).parameters())
    assert measure(tmp_path)["weights MB"] == pytest.approx(2 * n / 1e6)
