"""Measure the memory per process of a model of a billion parameters, and the time that its checkpoints block training.

    python experiments/benchmarks/large_model.py TEXT [--devices 1 2 4] [--n_layer 20] [--n_embd 2048] [fit flags]

For each number of processes, `fit` trains a few steps under `fsdp2` (one process: unsharded), first without
checkpoints, then with a checkpoint in one file, a sharded one, and a sharded one in the background. The resident memory
of each process is read from `/proc` twenty times per second; memory that is backed by files, such as libraries, is not
counted, and neither is that of the same run with a tiny network ("base"). Saving is timed by Lightning's profiler on
rank 0. At the end, the sharded checkpoint of the last number of processes is converted, and the memory of the
conversion is measured.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

GB = 1e9
INTERVAL = 0.05
"""Seconds between two readings of the memory."""
STATUS = re.compile(r"^(RssAnon|RssShmem):\s+(\d+) kB", re.MULTILINE)


def descendants(pid: int) -> Iterator[int]:
    """Yield a process ID and those of all its descendants, depth first."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield from descendants(child)


class MemoryReader(threading.Thread):
    """Thread that records the peak memory of a process and its descendants, in bytes, keyed by process id."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.ended = pid, threading.Event()
        self.peak: dict[int, int] = defaultdict(int)

    def run(self) -> None:
        """Read the memory until ``ended`` is set."""
        while not self.ended.wait(INTERVAL):
            for pid in descendants(self.pid):
                try:
                    found = STATUS.findall(Path(f"/proc/{pid}/status").read_text())
                except OSError:
                    continue
                self.peak[pid] = max(self.peak[pid], sum(int(kilobytes) * 1024 for _, kilobytes in found))


def measure(command: list[str]) -> tuple[list[float], str, float]:
    """Run a command; return the peak memory of its processes in GB, largest first, its output, and its duration."""
    began = time.perf_counter()
    # Otherwise, glibc would keep freed blocks instead of returning them to the system, which would inflate the peak.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, text=True, env=environment, **pipes)
    reader = MemoryReader(process.pid)
    reader.start()
    out, _ = process.communicate()
    reader.ended.set()
    reader.join()
    if process.returncode:
        sys.exit(out)
    peaks = sorted(reader.peak.values(), reverse=True)
    return [bytes_ / GB for bytes_ in peaks], out, time.perf_counter() - began


def fit(arguments: argparse.Namespace, devices: int, runs: str, *flags: str, tiny: bool = False) -> list[str]:
    """Return a command that trains the network, or a tiny one."""
    layers, width = (1, 64) if tiny else (arguments.n_layer, arguments.n_embd)
    layout = [] if devices == 1 else ["--trainer.strategy=fsdp2", f"--trainer.devices={devices}"]
    return [
        sys.executable, "-m", "lit_gpt_scratch.fit", f"--data.source={arguments.text}", f"--runs={runs}",
        f"--data.cache={runs}/cache", "--data.vocab_size=4096", f"--model.gpt.n_layer={layers}",
        f"--model.gpt.n_embd={width}", "--model.gpt.n_head=16", "--data.block_size=64", "--data.batch_size=1",
        "--model.optimizer=AdamW", "--model.compile=false", f"--trainer.precision={arguments.precision}",
        "--trainer.accelerator=cpu", f"--trainer.max_steps={arguments.steps}", "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false", "--inspect.every_n_steps=0", *layout, *flags, *arguments.flags,
    ]  # fmt: skip


def main() -> None:
    """Run the measurements and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="text to train on")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--n_layer", type=int, default=20, help="number of blocks")
    parser.add_argument("--n_embd", type=int, default=2048, help="width")
    parser.add_argument("--precision", default="bf16-true", help="value of --trainer.precision")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--memory_only", action="store_true", help="do not save or convert checkpoints")
    arguments, arguments.flags = parser.parse_known_args()
    print(f"{platform.machine()}, {arguments.n_layer} x {arguments.n_embd}, {arguments.precision}")
    whole = 0.0
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as runs:
        measure(fit(arguments, 1, runs, tiny=True))  # prepares the data
        for devices in arguments.devices:
            base, _, _ = measure(fit(arguments, devices, runs, "--trainer.enable_checkpointing=false", tiny=True))
            peaks, _, seconds = measure(fit(arguments, devices, runs, "--trainer.enable_checkpointing=false"))
            own = [peak - base[0] for peak in peaks[:devices]]
            whole = whole or own[0]
            shares = ", ".join(f"{each:.2f}" for each in own)
            share = max(own) / whole
            print(f"{devices} processes: {shares} GB above a base of {base[0]:.2f} GB; {share:.3f} of row 1;"
                  f" {seconds:.0f} s", flush=True)  # fmt: skip
            formats = {"file": "false", "sharded": "false", "sharded, background": "true"}
            for name, background in {} if arguments.memory_only else formats.items():
                saving = [f"--checkpoint.format={name.partition(',')[0]}", f"--checkpoint.background={background}"]
                every = ["--checkpoint.every_n_steps=1", "--trainer.profiler=simple", f"--experiment={devices}"]
                peaks, out, seconds = measure(fit(arguments, devices, runs, *saving, *every))
                saved = re.search(r"save_checkpoint\s*\|\s*([\d.]+)\s*\|\s*(\d+)", out)
                blocked = f"{saved[1]} s blocked per save, {saved[2]} saves" if saved else "no saves found"
                shares = ", ".join(f"{peak - base[0]:.2f}" for peak in peaks[:devices])
                print(f"  {name}: {blocked}; {shares} GB; {seconds:.0f} s in all", flush=True)
        if not arguments.memory_only:
            checkpoint = max(Path(runs, str(devices)).glob("version_*/checkpoints/last.ckpt"))
            sizes = [file.stat().st_size / GB for file in checkpoint.rglob("*.safetensors")]
            print(f"{len(sizes)} files with shards, {sum(sizes):.1f} GB, the largest {max(sizes):.2f} GB")
            for name, output in {"to-file": "x.ckpt", "to-safetensors": "x.safetensors", "to-hf": "x"}.items():
                command = [sys.executable, "-m", "lit_gpt_scratch.convert", name, str(checkpoint), f"{runs}/{output}"]
                peaks, _, seconds = measure(command)
                print(f"  {name}: {peaks[0]:.2f} GB, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
