"""Compare the training speed with nanoGPT, litgpt and `transformers`, for the same model, batch size and optimizer.

    python experiments/benchmarks/training.py [--nanogpt CHECKOUT] [--litgpt CHECKOUT] [--rounds 15]

This package runs `fit` as a user would, with all callbacks, default logging and data loading. The other
implementations run plain loops over existing batches, without logging, with the training step from their own code:
nanoGPT's `train.py`, litgpt's `pretrain.py` with Fabric, and a plain loop around `GPT2LMHeadModel`. All
implementations use GPT-2's architecture with biases, tied embeddings, the exact GELU and no dropout, clip gradients
to norm 1, and use AdamW. nanoGPT and litgpt use PyTorch's fused AdamW only on GPUs; in this benchmark, all
implementations use the fused AdamW, because it is also faster on CPUs. litgpt does not support learned positions and
uses the rotary positions of Pythia. This package compiles each block separately, which is the default; the other
implementations compile the whole network.

Each implementation runs in its own process, as for its users; in a shared process, the implementations would affect
each other's memory allocation. They alternate in turns of ten steps, one logging interval of `fit`, and every round
starts with a different implementation. The first turn includes compilation and the second turn is a warm-up; neither
is counted. The table shows the median speed over all turns, and the median and quartiles of the speed relative to the
fastest other implementation within each round.
"""

import argparse
import contextlib
import importlib
import logging
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from lit_gpt_scratch.cli.error_formatting import silence_libraries
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.distributed.hardware_defaults import configure_process

STEPS = 10
"""Number of steps per turn, one logging interval of `fit`."""
UNCOUNTED = 2
"""Number of turns at the start that are not counted."""
MODES = ["float32", "float32, medium", "bfloat16, compiled"]
"""Precision modes. In ``medium``, the other implementations set PyTorch's matmul precision to allow bfloat16; on a
processor without bfloat16 support, they then use float32 matmuls of oneDNN. This package does not require this mode."""
Take = Callable[[Tensor, Tensor], None]


class Shape(NamedTuple):
    """Dimensions of the model and of a batch."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    vocab_size: int

    def __str__(self) -> str:
        return f"{self.n_layer} x {self.n_embd}, {self.batch_size} windows of {self.block_size}, {self.vocab_size:,}"


SHAPES = [
    Shape(4, 4, 128, 64, 12, 65), Shape(6, 6, 384, 256, 4, 65),
    Shape(4, 4, 128, 64, 12, 4096), Shape(6, 6, 384, 256, 4, 4096),
]  # fmt: skip


class Turns(L.Callback):
    """Callback that runs a trainer in turns; it must be the first callback, so that its times include the others."""

    def __init__(self, parent: Connection) -> None:
        self.parent = parent
        self._began = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """At the end of each turn, send its duration to the parent process and wait for the next turn."""
        if trainer.global_step % STEPS:
            return
        if trainer.global_step:
            self.parent.send(time.perf_counter() - self._began)
        self.parent.recv()  # also after the last turn, so that the end of training does not overlap with other turns
        self._began = time.perf_counter()


def autocast(compiled: bool) -> torch.autocast:
    """Return a context manager for bfloat16 mixed precision, which is enabled only if the network is compiled."""
    return torch.autocast("cpu", torch.bfloat16, enabled=compiled)


def nanogpt(checkout: Path, shape: Shape, compiled: bool) -> tuple[torch.nn.Module, Take]:
    """Build nanoGPT's network and the training step of its `train.py`."""
    sys.path.insert(0, str(checkout))
    peer = importlib.import_module("model")
    sys.path.pop(0)
    with contextlib.redirect_stdout(sys.stderr):  # nanoGPT prints the model size
        config = peer.GPTConfig(
            shape.block_size, shape.vocab_size, shape.n_layer, shape.n_head, shape.n_embd, dropout=0.0, bias=True
        )
        net = peer.GPT(config)
        optimizer = net.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device_type="cuda")  # selects the fused optimizer
    model = torch.compile(net) if compiled else net
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def take(inputs: Tensor, labels: Tensor) -> None:
        with autocast(compiled):
            _, loss = model(inputs, labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return net, take


def litgpt(checkout: Path, shape: Shape, compiled: bool) -> tuple[torch.nn.Module, Take]:
    """Build litgpt's network and the training step of its `pretrain.py`."""
    sys.path.insert(0, str(checkout))
    peer, utils = importlib.import_module("litgpt.model"), importlib.import_module("litgpt.utils")
    sys.path.pop(0)
    config = peer.Config(
        block_size=shape.block_size, n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd,
        vocab_size=shape.vocab_size, padded_vocab_size=shape.vocab_size, parallel_residual=False, bias=True,
        intermediate_size=4 * shape.n_embd,
    )  # fmt: skip
    fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if compiled else "32-true")
    net = peer.GPT(config)
    net.apply(net._init_weights)
    net.transformer.wte.weight = net.lm_head.weight
    model = fabric.setup(torch.compile(net) if compiled else net)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    )

    def take(inputs: Tensor, labels: Tensor) -> None:
        loss = utils.chunked_cross_entropy(model(inputs), labels)
        fabric.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # Fabric does not clip for a fused AdamW
        optimizer.step()
        optimizer.zero_grad()

    return net, take


def huggingface(shape: Shape, compiled: bool) -> tuple[torch.nn.Module, Take]:
    """Build GPT-2 from `transformers` and the training step of a plain loop."""
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.block_size, n_embd=shape.n_embd, n_layer=shape.n_layer,
        n_head=shape.n_head, activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, attn_implementation="sdpa", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    net = transformers.GPT2LMHeadModel(config).train()

    def mean_loss(inputs: Tensor, labels: Tensor) -> Tensor:  # the loss of the model would shift the labels again
        return F.cross_entropy(net(input_ids=inputs).logits.flatten(0, 1), labels.flatten())

    model = torch.compile(mean_loss) if compiled else mean_loss
    optimizer = torch.optim.AdamW(net.parameters(), lr=6e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)

    def take(inputs: Tensor, labels: Tensor) -> None:
        with autocast(compiled):
            loss = model(inputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return net, take


def ours(shape: Shape, compiled: bool, parent: Connection, count: int) -> None:
    """Run `fit` in turns, with flags that a user would set."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        write_text(text, shape.vocab_size - 1)  # one token is the end of text
        flags = {
            "runs": Path(folder, "runs"), "preset": "gpt2_124m",
            "data.source": text, "data.cache": Path(folder, "cache"), "data.tokenizer": "char",
            "data.vocab_size": shape.vocab_size, "data.block_size": shape.block_size,
            "data.batch_size": shape.batch_size,
            "model.gpt.n_layer": shape.n_layer, "model.gpt.n_head": shape.n_head, "model.gpt.n_embd": shape.n_embd,
            "model.gpt.feed_forward": "gelu_exact", "model.optimizer": "AdamW", "model.optimizer.lr": 6e-4,
            "model.compile": compiled, "trainer.accelerator": "cpu",
            "trainer.precision": "bf16-mixed" if compiled else "32-true",
            "trainer.max_steps": STEPS * count + 1, "trainer.limit_val_batches": 0,
        }  # fmt: skip
        cli = FitCLI([f"--{name}={value}" for name, value in flags.items()])
        cli.trainer.callbacks.insert(0, Turns(parent))
        cli.fit()
        assert cli.datamodule.vocab_size == shape.vocab_size
        parent.send(sum(p.numel() for p in cli.model.net.parameters()))


def another(name: str, checkout: Path | None, shape: Shape, compiled: bool, parent: Connection, count: int) -> None:
    """Run the plain loop of another implementation in turns, over existing batches."""
    if checkout is None:
        net, take = huggingface(shape, compiled)
    else:
        net, take = {"nanoGPT": nanogpt, "litgpt": litgpt}[name](checkout, shape, compiled)
    ids = torch.randint(shape.vocab_size, (count, STEPS, shape.batch_size, shape.block_size + 1))
    for turn in zip(ids[..., :-1].contiguous(), ids[..., 1:].contiguous(), strict=True):
        parent.recv()
        began = time.perf_counter()
        for inputs, labels in zip(*turn, strict=True):
            take(inputs, labels)
        parent.send(time.perf_counter() - began)
    parent.recv()
    without = shape.block_size * shape.n_embd if name == "litgpt" else 0
    parent.send(sum(p.numel() for p in net.parameters()) + without)


def process(name: str, checkout: Path | None, shape: Shape, mode: str, parent: Connection, count: int) -> None:
    """Run one implementation in turns, as the target of its own process."""
    configure_process()
    silence_libraries()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    compiled = mode == "bfloat16, compiled"
    if name == "ours":
        ours(shape, compiled, parent, count)
    else:
        torch.set_float32_matmul_precision("medium" if mode == "float32, medium" else "highest")
        another(name, checkout, shape, compiled, parent, count)


def write_text(path: Path, kinds: int) -> None:
    """Write random characters from an alphabet of the given size, which consists of Hangul if it is large."""
    draw = random.Random(0)
    alphabet = [chr(code) for code in (range(48, 48 + kinds) if kinds < 1000 else range(0xAC00, 0xAC00 + kinds))]
    lines = (draw.choices(alphabet, k=1000) for _ in range(400))
    path.write_text("".join(alphabet) * 2 + "".join(map("".join, lines)), encoding="utf-8")


def measure(shape: Shape, mode: str, checkouts: dict[str, Path | None], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every counted turn, keyed by implementation."""
    context = multiprocessing.get_context("spawn")
    count = rounds + UNCOUNTED
    mine: dict[str, Connection] = {}
    for name, checkout in {"ours": None, **checkouts, "transformers": None}.items():
        if checkout is None and name in checkouts:
            continue
        mine[name], theirs = context.Pipe()
        context.Process(target=process, args=(name, checkout, shape, mode, theirs, count), daemon=True).start()
        theirs.close()
    seconds: dict[str, list[float]] = {name: [] for name in mine}
    names = list(mine)
    for number in range(count):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            mine[name].send("your turn")
            seconds[name].append(mine[name].recv())
    sizes = {}
    for name, connection in mine.items():
        connection.send("done")
        sizes[name] = connection.recv()
    assert len(set(sizes.values())) == 1, sizes
    return {name: of[UNCOUNTED:] for name, of in seconds.items()}


def main() -> None:
    """Measure every shape in every mode and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--litgpt", type=Path, help="a checkout of github.com/Lightning-AI/litgpt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="indices of the shapes to measure, from 0"
    )
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
    given = parser.parse_args()
    configure_process()
    versions = f"torch {torch.__version__}, lightning {L.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {versions}")
    print(f"{'shape, vocabulary':37} {'mode':18}  {'who':12} {'tokens/s':>9}   of the best peer (quartiles)")
    for number in given.shapes:
        shape = SHAPES[number]
        for mode in given.modes:
            checkouts = {"nanoGPT": given.nanogpt, "litgpt": given.litgpt}
            seconds = measure(shape, mode, checkouts, given.rounds)
            medians = {name: statistics.median(of) for name, of in seconds.items()}
            best = min((name for name in medians if name != "ours"), key=lambda name: medians[name])
            for name, median in medians.items():
                speed = STEPS * shape.batch_size * shape.block_size / median
                ratios = [its / own for its, own in zip(seconds[best], seconds[name], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                print(
                    f"{shape!s:37} {mode:18}  {name:12} {speed:9,.0f}   {middle:.2f} ({low:.2f} to {high:.2f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
