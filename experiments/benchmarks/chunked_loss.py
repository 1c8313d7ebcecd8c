"""Measure the memory and the time of the loss in chunks of positions, relative to that of all logits at once.

    python experiments/benchmarks/chunked_loss.py [--preset gpt2_124m] [--batch_size 12] [--precision float32]

A step is a forward and a backward pass on a random micro-batch of 1,024 tokens per row, uncompiled and without an
optimizer. Peak memory is the largest resident set of a process of its own per variant (`VmHWM`), which includes Python
and the weights. For the times, the variants take turns in one process, and every round starts with another variant. The
table shows the median and the quartiles of the step time, and those of its ratio to the step with all logits in the
same round. The first round is a warm-up.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lit_gpt_scratch.losses.chunked_cross_entropy import chunked_cross_entropy
from lit_gpt_scratch.losses.cross_entropy import positions_per_chunk, token_cross_entropy
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.presets import PRESETS

VOCABULARY, BLOCK_SIZE = 50_257, 1024
Step = Callable[[], None]


def build(arguments: argparse.Namespace) -> tuple[GPT, Callable[[int | None], Step]]:
    """Return the network, and a function that returns the step for a size of the logits in MB, or None for all."""
    torch.manual_seed(0)
    net = GPT(PRESETS[arguments.preset], VOCABULARY, BLOCK_SIZE)
    checkpointing = arguments.activation_checkpointing
    net.activation_checkpointing = True if checkpointing == "true" else checkpointing
    ids = torch.randint(VOCABULARY, (arguments.batch_size, BLOCK_SIZE + 1))
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def of_size(max_logits_mb: int | None) -> Step:
        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bfloat16"):
                if max_logits_mb is None:
                    loss, count = token_cross_entropy(net(inputs), labels)
                else:
                    size = positions_per_chunk(VOCABULARY, max_logits_mb)
                    x = net.hidden_states(inputs)
                    loss, count = chunked_cross_entropy(net.head, net.finalize_output, x, labels, size)
            (loss / count).backward()
            net.zero_grad()

        return step

    return net, of_size


def measure_peak(arguments: argparse.Namespace, max_logits_mb: int | None) -> float:
    """Return the peak memory of this process in GB after two steps."""
    step = build(arguments)[1](max_logits_mb)
    for _ in range(2):
        step()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e9


def measure_times(arguments: argparse.Namespace, sizes: list[int | None]) -> list[list[float]]:
    """Return the seconds of each step of each variant, without the first round."""
    of_size = build(arguments)[1]
    steps = [of_size(size) for size in sizes]
    seconds: list[list[float]] = [[] for _ in sizes]
    for number in range(arguments.rounds + 1):
        for place in range(len(sizes)):
            variant = (place + number) % len(sizes)
            began = time.perf_counter()
            steps[variant]()
            seconds[variant].append(time.perf_counter() - began)
    return [times[1:] for times in seconds]


def quartiles(values: list[float], form: str) -> str:
    """Format the median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    """Measure every variant and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2_124m")
    parser.add_argument("--batch_size", type=int, default=12)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--activation_checkpointing", choices=["true", "keep_attention", "keep_matmuls"], default=False)
    parser.add_argument("--max_logits_mb", type=int, nargs="+", default=[64], help="sizes of the logits in MB")
    parser.add_argument("--rounds", type=int, default=5, help="counted steps per variant; 0 measures only memory")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    checkpointing = (
        f", checkpointing {arguments.activation_checkpointing}" if arguments.activation_checkpointing else ""
    )
    print(
        f"{arguments.preset}, {arguments.batch_size} x {BLOCK_SIZE}, {arguments.precision}{checkpointing}", flush=True
    )
    sizes: list[int | None] = [None, *arguments.max_logits_mb]
    peaks = []
    for size in sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(measure_peak, (arguments, size)))
        name = "all" if size is None else f"{size} MB"
        print(f"logits: {name:10} peak {peaks[-1]:6.2f} GB, {peaks[-1] / peaks[0]:.2f} of all logits", flush=True)
    if arguments.rounds:
        seconds = measure_times(arguments, sizes)
        for size, times in zip(sizes, seconds, strict=True):
            name = "all" if size is None else f"{size} MB"
            ratios = [one / other for one, other in zip(times, seconds[0], strict=True)]
            print(f"logits: {name:10} {quartiles(times, '.2f')} s per step, ratio {quartiles(ratios, '.3f')}")


if __name__ == "__main__":
    main()
