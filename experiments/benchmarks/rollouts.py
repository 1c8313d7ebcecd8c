"""Compare batched decoding with a KV cache to decoding that recomputes the whole text for each token.

    python experiments/benchmarks/rollouts.py [--rounds 5]

All implementations generate 128 tokens for each of 16 prompts; the benchmark checks that the tokens are equal. The
implementations alternate in rounds, after a warm-up round that is not counted. The table shows the median speed over
all rounds, and the median of the speed-up from the KV cache within each round.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final

import torch

from lit_gpt_scratch.distributed.hardware_defaults import limit_threads
from lit_gpt_scratch.generation.decode_loop import generate
from lit_gpt_scratch.generation.sampling import Sampling
from lit_gpt_scratch.model import GPT, GPTConfig

SHAPES: Final = {
    "1 x 64": GPTConfig(n_layer=1, n_head=4, n_embd=64, bigram_rows=4096),
    "4 x 128": GPTConfig(n_layer=4, n_head=4, n_embd=128),
}
ROWS, PROMPT, NEW, VOCABULARY = 16, 16, 128, 1024
GREEDY: Final = Sampling(temperature=0.0)
Texts = list[list[int]]


def cached(model: GPT, prompts: Texts) -> Texts:
    """Generate with a KV cache, in the same way as rollouts."""
    texts = [list(prompt) for prompt in prompts]
    for row, token in generate(model, prompts, NEW, GREEDY, [0] * len(prompts), end_of_text=-1):
        if token is not None:
            texts[row].append(token)
    return texts


@torch.inference_mode()
def recomputed(model: GPT, prompts: Texts) -> Texts:
    """Generate all rows in one batch, recomputing the whole text for each token."""
    ids = torch.tensor(prompts)
    for _ in range(NEW):
        chosen = model.apply_head(model.hidden_states(ids)[:, -1:])[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, chosen), 1)
    found: Texts = ids.tolist()
    return found


def one_by_one(model: GPT, prompts: Texts) -> Texts:
    """Generate one row after another, recomputing the whole text for each token."""
    return [text for prompt in prompts for text in recomputed(model, [prompt])]


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    limit_threads(processes=1)
    ways: Sequence[tuple[str, Callable[[GPT, Texts], Texts]]] = (
        ("cached, batched", cached),
        ("recomputed, batched", recomputed),
        ("recomputed, one by one", one_by_one),
    )
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'shape':9}{'way':24}{'tokens/s':>10}{'cached is faster by':>21}")
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        model = GPT(shape, VOCABULARY, PROMPT + NEW).eval()
        prompts = torch.randint(VOCABULARY, (ROWS, PROMPT)).tolist()
        seconds: dict[str, list[float]] = {way: [] for way, _ in ways}
        for turn in range(rounds + 1):
            texts = []
            for way, write in ways:
                began = time.perf_counter()
                texts.append(write(model, prompts))
                if turn:
                    seconds[way].append(time.perf_counter() - began)
            assert texts[0] == texts[1] == texts[2]
        first = seconds[ways[0][0]]
        for way, _ in ways:
            ratio = statistics.median(other / own for other, own in zip(seconds[way], first, strict=True))
            speed = ROWS * NEW / statistics.median(seconds[way])
            print(f"{name:9}{way:24}{speed:10,.0f}{ratio:20.1f}x", flush=True)


if __name__ == "__main__":
    main()
