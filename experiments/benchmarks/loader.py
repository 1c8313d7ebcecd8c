"""Measure the loading speed of batches, the time to seek to a step, and the time to open a token store of 100 GB.

    python experiments/benchmarks/loader.py

All measurements use one core. The store of 100 GB consists of sparse files, with as many shards and the same metadata
as a real store; each measurement opens it in a new process. For comparison, the benchmark also prints the step time
of the default run, which `fit --plan` measures on all cores.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from lit_gpt_scratch.data import PackedText
from lit_gpt_scratch.data.packing import PACKING_POLICIES
from lit_gpt_scratch.data.sampler import ShuffledOrder, ShuffledSampler
from lit_gpt_scratch.data.token_store import TokenStore
from lit_gpt_scratch.text.token_shards import TokenShard

ROUNDS = 7
SHARDS, SHARD_TOKENS = 1024, 50_000_000
OPEN = """
import sys, time
from pathlib import Path
from lit_gpt_scratch.data.token_store import TokenStore
began = time.perf_counter()
store = TokenStore.open(Path(sys.argv[1]))
opened = time.perf_counter()
store.train.read(store.train.n_tokens // 2, store.train.n_tokens // 2 + 2048)
print(opened - began, time.perf_counter() - opened)
"""


def milliseconds(values: list[float]) -> str:
    """Format the median, minimum and maximum of durations in seconds as milliseconds."""
    return f"{1e3 * statistics.median(values):.2f} ms ({1e3 * min(values):.2f} to {1e3 * max(values):.2f})"


def loading() -> None:
    """Measure the tokens per second of the data loader alone."""
    with tempfile.TemporaryDirectory() as folder:
        for policy in PACKING_POLICIES:
            for batch_size, block_size in ((8, 256), (32, 1024)):
                data = PackedText(packing=policy, block_size=block_size, batch_size=batch_size, cache=folder)
                data.setup("fit")
                speeds, each = [], []
                for _ in range(ROUNDS):
                    loader = iter(data.train_dataloader())
                    next(loader)
                    began = time.perf_counter()
                    n = sum(1 for _ in islice(loader, 200 if batch_size == 32 else 1000))
                    seconds = time.perf_counter() - began
                    speeds.append(n * batch_size * block_size / seconds / 1e6)
                    each.append(seconds / n)
                print(
                    f"{policy}, {batch_size} x {block_size}: {statistics.median(speeds):.0f} million tokens per second "
                    f"({min(speeds):.0f} to {max(speeds):.0f}), {milliseconds(each)} per batch"
                )


def step() -> None:
    """Measure the step time of the default run, for comparison with the time per batch."""
    command = [sys.executable, "-m", "lit_gpt_scratch.fit", "--plan", "--trainer.accelerator=cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"(\d+) ms (?:a|per) step", done.stdout + done.stderr)
    print(f"step of the default run, 8 x 256: {found[1] if found else '?'} ms")


def seeking() -> None:
    """Measure the time to seek to step 10^9 in an epoch of 10^12 windows, and the memory of a million positions."""
    times = []
    for seed in range(200):
        began = time.perf_counter()
        next(iter(ShuffledSampler(ShuffledOrder([10**12], seed), 8, start=(3, 10**9))))
        times.append(time.perf_counter() - began)
    print(f"seek to step 10^9 of 10^12 windows: {milliseconds(times)}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in islice(iter(ShuffledSampler(ShuffledOrder([10**12], 0), 8)), 1_000_000):
        pass
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"additional memory for a million more positions: {after - before} kB")


def opening() -> None:
    """Measure the time to open a very large store and to read a window from it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = PackedText(cache=name).store
        about = TokenStore.read_manifest(small.folder)
        first = TokenShard.write(folder, "train-00000", np.ones(1, np.uint16), np.array([[0, 1]], np.uint64))
        header = first.path("tokens").read_bytes()[: -first.tokens.nbytes]
        shards = []
        for n in range(SHARDS):
            shard = replace(first, name=f"train-{n:05}", n_tokens=SHARD_TOKENS, sizes=dict(first.sizes))
            with shard.path("tokens").open("wb") as file:
                content = header.replace(b"(1,)", f"({SHARD_TOKENS},)".encode())
                file.write(content[: len(header) - 1].rstrip(b" \n").ljust(len(header) - 1) + b"\n")
                file.truncate(len(header) + 2 * SHARD_TOKENS)
            shard.path("documents").write_bytes(first.path("documents").read_bytes())
            shard.sizes["tokens"] = shard.path("tokens").stat().st_size
            shards.append(shard.metadata)
        (folder / "tokenizer.json").write_bytes((small.folder / "tokenizer.json").read_bytes())
        TokenStore.write_manifest(folder, about | {"train": shards, "validation": []})
        gigabytes = sum(json.loads((folder / "checked.json").read_text())[f"{s['name']}.tokens.npy"][0] for s in shards)
        times = []
        for _ in range(ROUNDS):
            done = subprocess.run([sys.executable, "-c", OPEN, name], capture_output=True, text=True, check=True)
            times.append([float(word) for word in done.stdout.split()])
        opened, read = zip(*times, strict=True)
        print(
            f"a store of {gigabytes / 1e9:.0f} GB in {SHARDS:,} shards: opened in {milliseconds(list(opened))}, "
            f"its first window {milliseconds(list(read))} later"
        )


def main() -> None:
    """Run all measurements and print the results."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    step()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    loading()
    seeking()
    opening()


if __name__ == "__main__":
    main()
