"""Training speed, compared with nanoGPT, litgpt and `transformers` at equal model, batch and optimizer.

    python experiments/benchmarks/training.py [--nanogpt CHECKOUT] [--litgpt CHECKOUT] [--rounds 15]

Ours is `fit` as a user starts it, with all callbacks and default logging, including the loading of batches; the others
are bare loops without logging whose batches exist already, with the training step of their own code: nanoGPT's
`train.py`, litgpt's `pretrain.py` with its Fabric, a plain loop around `GPT2LMHeadModel`. All have GPT-2's
architecture with biases, tied embeddings, the exact GELU and no dropout, clip gradients to norm 1, and use AdamW.
nanoGPT and litgpt use PyTorch's fused AdamW on GPUs only; here all use it, because it is faster on CPUs too. litgpt
has no learned positions and uses Pythia's rotary ones. Ours compiles block by block, the default; the others compile
the whole network.

Each has its own process, as for its users; in one process they would affect each other's memory allocation. They
alternate in turns of ten steps, one logging interval of `fit`, starting with a different one in every round. The first
turn compiles and the second warms up; neither counts. The medians of all turns are printed, and the median and
quartiles of the ratios to the best of the others, within a round.
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
"""Steps per turn: one logging interval of `fit`."""
UNCOUNTED = 2
"""Turns that are not counted."""
MODES = ["float32", "float32, medium", "bfloat16, compiled"]
"""``medium`` is PyTorch's flag that allows bfloat16 multiplication, for the others: on a processor without it they get
float32 through oneDNN. Ours does not need the flag."""
Take = Callable[[Tensor, Tensor], None]


class Shape(NamedTuple):
    """The model and the window size."""

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
    """Lets a trainer take its steps in turns; must be the first callback, so that its times include the others."""

    def __init__(self, parent: Connection) -> None:
        self.parent = parent
        self._began = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """A turn of the trainer lasts until the call after the given number of steps."""
        if trainer.global_step % STEPS:
            return
        if trainer.global_step:
            self.parent.send(time.perf_counter() - self._began)
        self.parent.recv()  # after the last turn too: what follows must not overlap the others' last turn
        self._began = time.perf_counter()


def autocast(compiled: bool) -> torch.autocast:
    """Mixed precision, if the network is compiled."""
    return torch.autocast("cpu", torch.bfloat16, enabled=compiled)


def nanogpt(checkout: Path, shape: Shape, compiled: bool) -> tuple[torch.nn.Module, Take]:
    """The lines of `train.py` between two batches."""
    sys.path.insert(0, str(checkout))
    peer = importlib.import_module("model")
    sys.path.pop(0)
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size
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
    """The lines of `pretrain.py` between two batches."""
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
    """GPT-2 in a plain loop."""
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.block_size, n_embd=shape.n_embd, n_layer=shape.n_layer,
        n_head=shape.n_head, activation_function="gelu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, attn_implementation="sdpa", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    net = transformers.GPT2LMHeadModel(config).train()

    def mean_loss(
        inputs: Tensor, labels: Tensor
    ) -> Tensor:  # its own loss shifts labels, which are already shifted here
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
    """`fit` with flags that a user would give."""
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
    """A bare loop over existing batches."""
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
    """The loop of a process, from one turn to the next."""
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
    """Random characters of a given number of kinds: letters and, for many kinds, Hangul."""
    draw = random.Random(0)
    alphabet = [chr(code) for code in (range(48, 48 + kinds) if kinds < 1000 else range(0xAC00, 0xAC00 + kinds))]
    lines = (draw.choices(alphabet, k=1000) for _ in range(400))
    path.write_text("".join(alphabet) * 2 + "".join(map("".join, lines)), encoding="utf-8")


def measure(shape: Shape, mode: str, checkouts: dict[str, Path | None], rounds: int) -> dict[str, list[float]]:
    """Seconds of every turn, by implementation."""
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
    """Measure every shape in both modes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--litgpt", type=Path, help="a checkout of github.com/Lightning-AI/litgpt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="by number, from 0")
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
