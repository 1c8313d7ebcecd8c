"""Rows about several processes: FSDP2, parity of layouts, and the bandwidth of all-reduce."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from lit_gpt_scratch.acceptance.fit_rows import run_fit
from lit_gpt_scratch.acceptance.row import RowContext, RowFailed, Values
from lit_gpt_scratch.distributed.layout_parity import LayoutParity
from lit_gpt_scratch.schema import read_json
from lit_gpt_scratch.text.atomic_files import write_atomically

LOSS_TOLERANCE = 1e-2
"""Maximum relative difference between the final losses of a sharded and an unsharded run in bf16-mixed."""


def measure_fsdp2(context: RowContext, flags: Sequence[str], devices: int) -> Iterator[Values]:
    """Run ``fit`` with FSDP2 and without; yield both speeds and the relative difference of the final losses.

    Args:
        context: Where the row runs.
        flags: Flags of ``fit``.
        devices: Number of processes of the sharded run.

    Raises:
        RowFailed: The losses differ by more than ``LOSS_TOLERANCE``.
    """
    losses = []
    for name, more in {
        "one process": ["--trainer.devices=1"],
        "fsdp2": ["--trainer.strategy=fsdp2", f"--trainer.devices={devices}"],
    }.items():
        summary, _ = run_fit(context, *flags, *more)
        losses.append(summary["train/loss"])
        yield {f"{name}: tokens/s": summary["tokens_per_second"], f"{name}: loss": losses[-1]}
    difference = abs(losses[1] - losses[0]) / losses[0]
    yield {"relative difference of losses": difference}
    if not difference <= LOSS_TOLERANCE:
        raise RowFailed(f"the losses differ by more than {LOSS_TOLERANCE:g}")


def measure_layout_parity(
    context: RowContext, flags: Sequence[str], layouts: Sequence[str], cases: Sequence[str]
) -> Iterator[Values]:
    """Run the same steps in several layouts of processes, and yield the largest relative deviation of any loss.

    Raises:
        RowFailed: A deviation exceeds its tolerance.
    """
    folder = context.scratch / "parity"
    folder.mkdir()
    parity = LayoutParity(flags, folder, cases, layouts)
    parity.run()
    yield {f"{layout}, {case}": difference for (layout, case), difference in parity.loss.items()}
    if parity.violations:
        raise RowFailed(f"differ: {'; '.join(parity.violations)}")


def measure_all_reduce(context: RowContext, processes: int, n_bytes: int, repeats: int) -> Iterator[Values]:
    """Yield the bus bandwidth of all-reduce between processes: NCCL on GPUs, gloo on a CPU.

    Args:
        context: Where the row runs.
        processes: Number of processes, each with its own GPU.
        n_bytes: Size of the reduced tensor.
        repeats: Number of timed calls.

    Raises:
        RowFailed: The sum is wrong.
    """
    result = context.scratch / "all_reduce.json"
    arguments = (processes, context, n_bytes, repeats, result)
    method = "fork" if sys.platform == "linux" else "spawn"  # this process has not used a GPU, so it can be forked
    start_processes(_all_reduce, arguments, nprocs=processes, start_method=method)  # type: ignore[no-untyped-call]  # not annotated in torch
    found = read_json(result, dict[str, Any])
    yield {"backend": found["backend"], "processes": processes, "ms": 1000 * found["seconds"]}
    moved = 2 * (processes - 1) / processes * n_bytes  # bytes that each process sends in a ring
    yield {"bus GB/s": moved / found["seconds"] / 1e9}
    if not found["correct"]:
        raise RowFailed("all-reduce computed a wrong sum")


def _all_reduce(rank: int, processes: int, context: RowContext, n_bytes: int, repeats: int, result: Path) -> None:
    device = torch.device("cuda", rank) if context.on_cuda else context.device
    backend = "nccl" if context.on_cuda else "gloo"
    if context.on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, f"file://{context.scratch}/rendezvous", timedelta(seconds=60), world_size=processes, rank=rank
    )
    ones = torch.ones(n_bytes // 4, device=device)
    dist.all_reduce(ones)
    correct = bool((ones == processes).all())
    context.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(ones)
    context.synchronize()
    seconds = (time.perf_counter() - began) / repeats
    if rank == 0:
        write_atomically(result, json.dumps({"backend": backend, "seconds": seconds, "correct": correct}))
    dist.destroy_process_group()
