"""The cost of Lightning: the same model, batches and optimizer in a bare loop and through `fit` with default logging.

    python experiments/benchmarks/lightning_cost.py

Both run in lockstep in one process: after every step of `fit` the bare loop takes the same step, so that other load on
the machine affects both alike. The times of ten steps, one logging interval, are compared: each pair gives a
difference, and the median over all pairs counts. A Trainer with `barebones=True`, without callbacks and loggers, is
compared in the same way: the additional cost of `fit` is this project's own.
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
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader

from lit_gpt_scratch.batch_types import Batch
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT

SHAPES = {
    "6 x 384, 8 windows of 256": (
        ["--model.gpt.n_layer=6", "--model.gpt.n_head=6", "--model.gpt.n_embd=384"], 110,
    ),
    "4 x 128, 12 windows of 64": (
        ["--model.gpt.n_layer=4", "--model.gpt.n_head=4", "--model.gpt.n_embd=128", "--data.block_size=64",
         "--data.batch_size=12"], 810,
    ),
}  # fmt: skip
"""Flags, and steps."""
INTERVAL = 10
"""Steps from one log point to the next; the first interval compiles and does not count."""


class Lockstep(L.Callback):
    """Takes the same step in a bare loop between two trainer steps.

    It must be the first callback, so that its times include the others.
    """

    def __init__(self, bare: Iterator[None]) -> None:
        self.bare = bare
        self.in_trainer: list[float] = []
        self.in_bare_loop: list[float] = []
        self._resumed: float | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        """A trainer step lasts until the next call, minus the time of the bare loop."""
        came = time.perf_counter()
        if self._resumed is not None:
            self.in_trainer.append(came - self._resumed)
        next(self.bare)
        self._resumed = time.perf_counter()
        self.in_bare_loop.append(self._resumed - came)


def batches(cli: FitCLI, steps: int) -> Iterator[Batch]:
    """The batches of a run."""
    data = cli.datamodule
    for _, micro_batch in zip(range(steps), data.train_sampler, strict=False):
        yield data.train_dataset.make_batch(micro_batch.rows)


def bare_steps(cli: FitCLI, steps: int) -> Iterator[None]:
    """The steps of a run without a trainer: same windows, same computation, no logging."""
    net, optimizer, scheduler = build(cli, steps)
    for batch in batches(cli, steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=cli.config.trainer.precision == "bf16-mixed"):
            nats, tokens = token_cross_entropy(net(batch["input_ids"]), batch["labels"])
        optimizer.zero_grad()
        (nats / tokens).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        yield


def build(cli: FitCLI, steps: int) -> tuple[GPT, Optimizer, LRScheduler]:
    """The network, compiled, with its optimizer and schedule."""
    data, task = cli.datamodule, cli.model
    net = GPT(task.gpt, data.vocab_size, data.block_size)
    for block in net.blocks:
        block.compile()
    optimizer = task.optimizer.build(net)
    return net, optimizer, LambdaLR(optimizer, lambda step: task.schedule.factor(step, steps))


class Plain(L.LightningModule):
    """A minimal LightningModule that takes the same steps."""

    def __init__(self, cli: FitCLI, steps: int, lockstep: Lockstep) -> None:
        super().__init__()
        self.net, self.built_optimizer, self.built_scheduler = build(cli, steps)
        self.on_train_batch_start = lockstep.on_train_batch_start

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch."""
        nats, tokens = token_cross_entropy(self.net(batch["input_ids"]), batch["labels"])
        return nats / tokens

    def configure_optimizers(self) -> Any:
        """The same optimizer and schedule."""
        return {
            "optimizer": self.built_optimizer, "lr_scheduler": {"scheduler": self.built_scheduler, "interval": "step"}
        }  # fmt: skip


def through_fit(cli: FitCLI, steps: int) -> Lockstep:
    """The default run, without validations."""
    lockstep = Lockstep(bare_steps(cli, steps))
    cli.trainer.limit_val_batches = 0
    cli.trainer.callbacks.insert(0, lockstep)
    cli.fit()
    return lockstep


def through_barebones(cli: FitCLI, steps: int) -> Lockstep:
    """The same steps in a barebones Trainer."""
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    lockstep = Lockstep(bare_steps(cli, steps))
    trainer = L.Trainer(
        barebones=True, accelerator="cpu", max_steps=steps, gradient_clip_val=1.0,
        precision=cli.config.trainer.precision,
    )  # fmt: skip
    trainer.fit(Plain(cli, steps, lockstep), DataLoader(list(batches(cli, steps)), batch_size=None))
    return lockstep


def intervals(seconds: list[float]) -> list[float]:
    """Milliseconds per step, by interval."""
    return [
        1000 * sum(seconds[first : first + INTERVAL]) / INTERVAL
        for first in range(INTERVAL, len(seconds) - INTERVAL + 1, INTERVAL)
    ]


def main() -> None:
    """Measure every shape and print a table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'milliseconds per step':48} {'bare':>8} {'trainer':>8}   difference (median and quartiles of the pairs)")
    for shape, (flags, steps) in SHAPES.items():
        for name, go in {"fit": through_fit, "a Trainer, barebones": through_barebones}.items():
            with tempfile.TemporaryDirectory() as runs:
                cli = FitCLI([*flags, f"--trainer.max_steps={steps}", "--trainer.accelerator=cpu", f"--runs={runs}"])
                lockstep = go(cli, steps)
            trainer, bare = intervals(lockstep.in_trainer), intervals(lockstep.in_bare_loop)
            costs = [one - other for one, other in zip(trainer, bare, strict=False)]
            low, cost, high = statistics.quantiles(costs, n=4)
            with_trainer, alone = statistics.median(trainer), statistics.median(bare)
            print(
                f"{f'{shape}: {name}':48} {alone:8.2f} {with_trainer:8.2f}   {cost:.2f} ms, {cost / alone:.1%} "
                f"({low:.2f} to {high:.2f} ms, {len(costs)} pairs)",
                flush=True,
            )


if __name__ == "__main__":
    main()
