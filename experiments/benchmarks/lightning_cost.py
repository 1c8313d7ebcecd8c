"""What Lightning costs: the same model, batches and optimizer in a bare loop and through `fit`, at default logging.

    python experiments/benchmarks/lightning_cost.py

Both sides take turns in one process. A side's figure is the mean period of its steps, those with logging among
them, without the first ten; of the turns the lowest counts, because what a neighbour on the machine does can only
add. The difference of the sides' medians stands beside it.
"""

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch

from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.data.sampler import WindowOrder
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.objectives.likelihood import token_nats

SHAPES = {
    "6 x 384, 8 windows of 256": (["--model.gpt.n_layer=6", "--model.gpt.n_head=6", "--model.gpt.n_embd=384"], 30),
    "4 x 128, 12 windows of 64": (
        ["--model.gpt.n_layer=4", "--model.gpt.n_head=4", "--model.gpt.n_embd=128", "--data.block_size=64",
         "--data.batch_size=12"], 300,
    ),
}  # fmt: skip
"""Flags, and steps of a turn."""
UNCOUNTED = 10


class Periods(L.Callback):
    """When each step began."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Look at the clock."""
        self.starts.append(time.perf_counter())


def build(flags: list[str], steps: int, runs: str) -> FitCLI:
    """The same command line for both sides."""
    return FitCLI([*flags, f"--trainer.max_steps={steps}", "--trainer.accelerator=cpu", f"--runs={runs}"])


def through_fit(cli: FitCLI) -> list[float]:
    """Start times of the steps of a run."""
    periods = Periods()
    cli.trainer.limit_val_batches = 0
    cli.trainer.callbacks.insert(0, periods)
    cli.fit()
    return periods.starts


def bare(cli: FitCLI, steps: int) -> list[float]:
    """Start times of the same steps, without a trainer."""
    data, task = cli.datamodule, cli.model
    data.prepare_data()
    data.setup("validate")
    net = GPT(task.gpt, data.vocab_size, data.block_size)
    for block in net.blocks:
        block.compile()
    optimizer = task.optimizer.build(net)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: task.schedule.factor(step, steps))

    def batches() -> Iterator[Any]:
        order = list(WindowOrder(len(data.train_windows), data.batch_size, seed=0))
        for first in range(0, len(order), data.batch_size):
            yield data.train_windows.__getitems__(order[first : first + data.batch_size])

    starts = []
    for _, batch in zip(range(steps), batches(), strict=False):
        starts.append(time.perf_counter())
        with torch.autocast("cpu", torch.bfloat16, enabled=cli.config.trainer.precision == "bf16-mixed"):
            nats, tokens = token_nats(net(batch["input_ids"]), batch["labels"])
        optimizer.zero_grad()
        (nats / tokens).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return starts


def per_step(starts: list[float]) -> float:
    """Mean milliseconds from one step's start to the next one's."""
    return 1000 * (starts[-1] - starts[UNCOUNTED]) / (len(starts) - 1 - UNCOUNTED)


def main() -> None:
    """Take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("milliseconds a step            bare (lowest, median)   fit (lowest, median)    fit - bare (lowest)")
    for name, (flags, steps) in SHAPES.items():
        times: dict[str, list[float]] = {"bare": [], "fit": []}
        for _ in range(given.turns):
            with tempfile.TemporaryDirectory() as runs:
                times["bare"].append(per_step(bare(build(flags, steps, runs), steps)))
                times["fit"].append(per_step(through_fit(build(flags, steps, runs))))
        lowest = {side: min(values) for side, values in times.items()}
        median = {side: statistics.median(values) for side, values in times.items()}
        cost = lowest["fit"] - lowest["bare"]
        print(
            f"{name:30} {lowest['bare']:8.2f} {median['bare']:8.2f}        {lowest['fit']:8.2f} {median['fit']:8.2f}"
            f"       {cost:8.2f} ms, {cost / lowest['bare']:.1%} (medians {median['fit'] - median['bare']:.2f} ms)",
            flush=True,
        )


if __name__ == "__main__":
    main()
