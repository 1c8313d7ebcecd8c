"""Measure the overhead of Lightning, by comparing `fit` with default logging to a plain PyTorch training loop.

    python experiments/benchmarks/lightning_cost.py

Both use the same model, batches and optimizer, and run in lockstep in one process: before every step of `fit`, the
plain loop takes the same step, so that other load on the machine affects both equally. Times are compared for
intervals of ten steps, the logging interval of `fit`. Each pair of intervals yields a difference, and the median over
all pairs is reported. A Trainer with `barebones=True`, which has no callbacks and no loggers, is compared with the
plain loop in the same way. The additional cost of `fit` comes from this package.
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
"""Flags and number of steps of each case."""
INTERVAL = 10
"""Number of steps per interval. The first interval includes compilation and is not counted."""


class Lockstep(L.Callback):
    """Callback that runs a step of the plain loop before every trainer step.

    It must be the first callback, so that the trainer steps that it measures include all other callbacks.
    """

    def __init__(self, bare: Iterator[None]) -> None:
        self.bare = bare
        self.in_trainer: list[float] = []
        self.in_bare_loop: list[float] = []
        self._resumed: float | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        """Record the trainer step that ends with this call, and run and record a step of the plain loop."""
        came = time.perf_counter()
        if self._resumed is not None:
            self.in_trainer.append(came - self._resumed)
        next(self.bare)
        self._resumed = time.perf_counter()
        self.in_bare_loop.append(self._resumed - came)


def batches(cli: FitCLI, steps: int) -> Iterator[Batch]:
    """Yield the training batches of a run."""
    data = cli.datamodule
    for _, micro_batch in zip(range(steps), data.train_sampler, strict=False):
        yield data.train_dataset.make_batch(micro_batch.rows)


def bare_steps(cli: FitCLI, steps: int) -> Iterator[None]:
    """Run the same steps in a plain loop without logging, with the same batches; yield after each step."""
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
    """Build the network, compile its blocks, and build its optimizer and learning-rate schedule."""
    data, task = cli.datamodule, cli.model
    net = GPT(task.gpt, data.vocab_size, data.block_size)
    for block in net.blocks:
        block.compile()
    optimizer = task.optimizer.build(net)
    return net, optimizer, LambdaLR(optimizer, lambda step: task.schedule.factor(step, steps))


class Plain(L.LightningModule):
    """Minimal LightningModule with the same training step as the plain loop."""

    def __init__(self, cli: FitCLI, steps: int, lockstep: Lockstep) -> None:
        super().__init__()
        self.net, self.built_optimizer, self.built_scheduler = build(cli, steps)
        self.on_train_batch_start = lockstep.on_train_batch_start

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of the batch."""
        nats, tokens = token_cross_entropy(self.net(batch["input_ids"]), batch["labels"])
        return nats / tokens

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the learning-rate schedule, with the same settings as in the plain loop."""
        return {
            "optimizer": self.built_optimizer, "lr_scheduler": {"scheduler": self.built_scheduler, "interval": "step"}
        }  # fmt: skip


def through_fit(cli: FitCLI, steps: int) -> Lockstep:
    """Run `fit` without validation; return the callback with the recorded times."""
    lockstep = Lockstep(bare_steps(cli, steps))
    cli.trainer.limit_val_batches = 0
    cli.trainer.callbacks.insert(0, lockstep)
    cli.fit()
    return lockstep


def through_barebones(cli: FitCLI, steps: int) -> Lockstep:
    """Run the same steps in a barebones Trainer; return the callback with the recorded times."""
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
    """Return the milliseconds per step in each interval except the first."""
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
