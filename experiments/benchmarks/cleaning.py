"""Measure the memory and time of cleaning and tokenizing a large corpus.

    python experiments/benchmarks/cleaning.py [--gigabytes 1 2] [--folder FOLDER]

The text is synthetic: documents of about a kilobyte whose words follow a Zipf distribution, in one JSONL file. One in
a hundred documents is an exact duplicate. `prepare` runs in its own process, as for a user. Memory is the peak
proportional set size of the process and all its children, sampled ten times per second, minus the peak for a very
small corpus. Three sets of cleaning steps are measured: exact deduplication, which is the default; text rules and
exact deduplication, in several processes; and exact deduplication and near-deduplication. The benchmark requires
Linux.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STEPS: dict[str, list[str]] = {
    "exact duplicates": ["ExactDuplicates"],
    "text rules": ["UnicodeNormalization", "ControlCharacters", "Whitespace", "MaskContacts", "ExactDuplicates"],
    "near-duplicates": ["ExactDuplicates", "NearDuplicates"],
}
SMALL = 0.001
"""Size in gigabytes of a corpus that requires hardly more memory than the process itself."""


def generate(path: Path, gigabytes: float) -> int:
    """Write documents with the given total size to a JSONL file; return the number of documents."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=1 + n % 11)) for n in range(50_000)])
    written, n_documents, text = 0, 0, ""
    with path.open("w", encoding="utf-8") as file:
        while written < gigabytes * 1e9:
            drawn = words[np.minimum(rng.zipf(1.3, size=200_000), len(words)) - 1]
            for start in range(0, len(drawn), 200):
                if n_documents % 100 != 99:
                    text = f"{n_documents} " + " ".join(drawn[start : start + 200]) + "."
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text)
                n_documents += 1
    return n_documents


def peak(command: list[str]) -> tuple[float, float]:
    """Run a command; return its peak memory in bytes, including child processes, and its duration in seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, sum(map(proportional, tree(process.pid))))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return most, time.perf_counter() - began


def tree(pid: int) -> list[int]:
    """Return the ids of a process and all its descendants."""
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text(encoding="ascii").split()
        ]
    except OSError:
        return [pid]
    return [pid, *(found for child in children for found in tree(child))]


def proportional(pid: int) -> int:
    """Return the proportional set size in bytes, which divides shared memory among the processes that share it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def main() -> None:
    """Measure all sets of cleaning steps for all corpus sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument(
        "--folder", default=None, help="folder for temporary files, which take about three times the size of the text"
    )
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(
        f"{platform.processor() or platform.machine()}, {cores} cores, Python {platform.python_version()}", flush=True
    )
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        small: dict[str, float] = {}
        for gigabytes in [SMALL, *given.gigabytes]:
            source = Path(folder, "text.jsonl")
            n_documents = generate(source, gigabytes)
            for name in given.steps:
                with tempfile.TemporaryDirectory(dir=folder) as store:
                    most, seconds = peak(
                        [
                            *(sys.executable, "-m", "lit_gpt_scratch.prepare", f"--data.source={source}"),
                            *(f"--data.store={store}/store", "--data.cleaning", json.dumps(STEPS[name])),
                        ]
                    )
                small.setdefault(name, most)
                if gigabytes != SMALL:
                    above = most - small[name]
                    print(
                        f"{gigabytes:g} GB, {n_documents:,} documents, {name}: "
                        f"{above / 1e9:.2f} GB above the baseline, "
                        f"{above / n_documents:,.0f} bytes per document; {seconds:.0f} s, "
                        f"{1000 * gigabytes / seconds:.1f} MB/s with tokens",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
