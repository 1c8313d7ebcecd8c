"""What it takes to clean and tokenise a large corpus: memory, above that of a small one, and time.

    python experiments/benchmarks/cleaning.py [--gigabytes 1 2] [--folder FOLDER]

Text is generated: words drawn by Zipf's law, a kilobyte or so a document, one in a hundred an exact copy of another,
and put into one JSON lines file. `prepare` runs on it as a user would run it, in a process of its own; the memory is
the sum over it and all its children (their proportional set size), looked at ten times a second. The steps: exact
duplicates alone, which is the default; text rules in several processes; near-duplicates. Linux only.
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
"""Gigabytes of text that need next to no memory beside what the process starts with."""


def generate(path: Path, gigabytes: float) -> int:
    """Write documents until there is so much text; the number of them."""
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
    """Run it; the most memory of it and its children, in bytes, and its seconds."""
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
    """A process and all below it."""
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
    """Bytes of memory, those that are shared divided among the sharers."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def main() -> None:
    """Measure all steps on all sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--folder", default=None, help="for text and tokens, some three times the text")
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
                        f"{gigabytes:g} GB, {n_documents:,} documents, {name}: {above / 1e9:.2f} GB above the start, "
                        f"{above / n_documents:,.0f} bytes a document; {seconds:.0f} s, "
                        f"{1000 * gigabytes / seconds:.1f} MB/s with tokens",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
