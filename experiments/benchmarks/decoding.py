"""Measure the speed of decoding with a KV cache, compared with ``transformers`` on the same weights.

    python experiments/benchmarks/decoding.py [--nanogpt CHECKOUT] [--rounds 7]

A GPT-2 model with random weights is exported and loaded by ``transformers``. Both implementations continue a prompt
of one token greedily; in float32, the benchmark checks that their tokens are equal. The implementations alternate in
rounds, after a warm-up round that is not counted. The table shows the median speed over all rounds, and the median of
the speed relative to ``transformers`` within each round. If a checkout of nanoGPT is given, nanoGPT is also measured;
it has no KV cache.
"""

import argparse
import contextlib
import importlib.util
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from lit_gpt_scratch.distributed.hardware_defaults import configure_process
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.interop import hf_checkpoint
from lit_gpt_scratch.interop.model_family import ModelShape
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.presets import PRESETS
from lit_gpt_scratch.text.tokenizer import Tokenizer

GPT2 = PRESETS["gpt2_124m"]
SHAPES = {
    "4 x 128": (replace(GPT2, n_layer=4, n_head=4, n_embd=128, ffn_dim=512), 257, 256, 200),
    "6 x 384": (replace(GPT2, n_layer=6, n_head=6, n_embd=384, ffn_dim=1536), 257, 256, 200),
    "124M": (GPT2, 50_257, 1024, 64),
}
"""Architecture, vocabulary size, context length and number of generated tokens of each case."""
GREEDY = Sampling(temperature=0.0)
Decode = Callable[[], list[int]]


def ours(model: GPT, rows: int, n: int, compile: bool) -> Decode:
    """Return a function that generates tokens with this package and returns the tokens of the last row."""

    def decode() -> list[int]:
        found = generate(model, [[1]] * rows, n, GREEDY, [0] * rows, end_of_text=-1, compile=compile)
        return [token for row, token in found if row == rows - 1 and token is not None]

    return decode


def theirs(model: Any, rows: int, n: int) -> Decode:
    """Return a function that generates tokens with ``transformers`` and returns the tokens of the last row."""
    prompt = torch.ones(rows, 1, dtype=torch.int64)

    def decode() -> list[int]:
        with torch.inference_mode():
            ids = model.generate(
                prompt, attention_mask=prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0
            )
        return ids[-1, 1:].tolist()  # type: ignore[no-any-return]  # a tensor's list

    return decode


def nanogpts(checkout: Path, config: GPTConfig, vocabulary: int, context: int, n: int) -> Decode:
    """Return a function that generates tokens with nanoGPT, which recomputes the whole text for each token."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(sys.stderr):  # nanoGPT prints the model size
        model = module.GPT(
            module.GPTConfig(context, vocabulary, config.n_layer, config.n_head, config.n_embd, dropout=0.0, bias=True)
        ).eval()
    return lambda: model.generate(torch.ones(1, 1, dtype=torch.int64), n, top_k=1)[0, 1:].tolist()  # type: ignore[no-any-return]  # a tensor's list


def contestants(name: str, nanogpt: Path | None) -> dict[tuple[str, str, int], Decode]:
    """Return the decoding functions to compare, keyed by implementation, dtype and number of rows."""
    config, vocabulary, context, n = SHAPES[name]
    torch.manual_seed(0)
    model = GPT(config, vocabulary, context).eval()
    tokenizer = Tokenizer.train(["a"], 257, "byte")
    found: dict[tuple[str, str, int], Decode] = {}
    with tempfile.TemporaryDirectory() as place:
        exported = Path(place, "exported")
        hf_checkpoint.write_hf_checkpoint(
            hf_checkpoint.PortableModel(ModelShape(config, vocabulary, context), model.state_dict(), tokenizer),
            exported,
        )
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype)[6:]
            mine = GPT(config, vocabulary, context).to(dtype).eval()
            mine.load_state_dict(model.state_dict())
            other = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=dtype)
            for rows in (1, 16):
                found["transformers", kind, rows] = theirs(other, rows, n)
                found["ours", kind, rows] = ours(mine, rows, n, compile=False)
                found["ours, compiled", kind, rows] = ours(mine, rows, n, compile=True)
    if nanogpt:
        found["nanoGPT", "float32", 1] = nanogpts(nanogpt, config, vocabulary, context, n)
    return found


def main() -> None:
    """Measure every shape and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    given = parser.parse_args()
    configure_process()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}")
    print(f"{'shape':8} {'type':9} {'rows':>4}  {'who':14} {'tokens/s':>9} {'of transformers':>16} {'of one row':>11}")
    for name in given.shapes:
        taking_part = contestants(name, given.nanogpt)
        torch.compiler.reset()
        written = {key: decode() for key, decode in taking_part.items()}  # not counted: compilation and warm-up
        assert len({tuple(written[who, "float32", 1]) for who in ("transformers", "ours", "ours, compiled")}) == 1
        speeds: dict[tuple[str, str, int], list[float]] = {key: [] for key in taking_part}
        for _ in range(given.rounds):
            for key, decode in taking_part.items():
                began = time.perf_counter()
                tokens = decode()
                speeds[key].append(key[2] * len(tokens) / (time.perf_counter() - began))
        medians = {key: statistics.median(speed) for key, speed in speeds.items()}
        for (who, kind, rows), speed in medians.items():
            pairs = zip(speeds[who, kind, rows], speeds["transformers", kind, rows], strict=True)
            relative = statistics.median(mine / its for mine, its in pairs)
            more = speed / medians[who, kind, 1]
            print(f"{name:8} {kind:9} {rows:4}  {who:14} {speed:9,.0f} {relative:16.2f} {more:11.1f}", flush=True)


if __name__ == "__main__":
    main()
