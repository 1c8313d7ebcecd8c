"""Compare the encoding speed of this package, of `encode_batch_fast` in `tokenizers`, and of `datasets.map`.

    python experiments/benchmarks/encoding.py [--source stdlib] [--vocab_size 8192 32000]

All implementations encode the same documents with the same merges, on one core and on two cores. The cores are
limited by process affinity, so that no library starts more threads. The implementations alternate, and the median
over all rounds is reported. The benchmark checks that all implementations produce the same token ids.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from lit_gpt_scratch.text import fast_encoder, tokenizer_training
from lit_gpt_scratch.text.sources import read_documents

ROUNDS = 5


def measure(source: str, vocab_size: int) -> None:
    """Print the speed of each implementation in MB/s, on the cores that this process may use."""
    texts = [document.text for document in read_documents(source)]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    backend = tokenizer_training.train_tokenizer("bpe", texts, vocab_size)
    backend.encode_special_tokens = True
    began = time.perf_counter()
    proven = fast_encoder.build_tiktoken_encoding(backend)
    proof = time.perf_counter() - began
    assert proven is not None
    ways: dict[str, Callable[[], list[np.ndarray]]] = {
        "ours": lambda: list(fast_encoder.encode_batch(backend, proven, texts)),
        "encode_batch_fast": lambda: list(fast_encoder.encode_batch(backend, None, texts)),
    }
    ways["datasets.map"] = lambda: by_datasets(backend, texts)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ids: dict[str, list[np.ndarray]] = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            ids[name] = way()
            seconds[name].append(time.perf_counter() - began)
    same = all(
        len(others) == len(ids["ours"]) and all(np.array_equal(a, b) for a, b in zip(ids["ours"], others, strict=True))
        for others in ids.values()
    )
    cores = len(os.sched_getaffinity(0))
    speeds = ", ".join(f"{name} {megabytes / statistics.median(took):.1f} MB/s" for name, took in seconds.items())
    print(
        f"{vocab_size:6,} tokens, {cores} core{'s' * (cores > 1)}: {speeds}; ids {'the same' if same else 'DIFFER'}, "
        f"{sum(map(len, ids['ours'])):,} of {megabytes:.1f} MB; proof {proof:.1f} s",
        flush=True,
    )


def by_datasets(backend: "tokenizer_training.Backend", texts: list[str]) -> list[np.ndarray]:
    """Encode with `datasets.map` as in tutorials: in batches, with one process per core and without a cache."""
    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()
    cores = len(os.sched_getaffinity(0))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {
            "ids": [encoding.ids for encoding in backend.encode_batch_fast(batch["text"], add_special_tokens=False)]
        }

    done = datasets.Dataset.from_dict({"text": texts}).map(
        encode, batched=True, remove_columns="text", num_proc=cores if cores > 1 else None
    )
    return [np.asarray(ids, dtype=np.uint32) for ids in done.with_format("numpy")["ids"]]


def main() -> None:
    """Measure all vocabulary sizes on one core and on two cores, in one process for each number of cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[8192, 32000])
    parser.add_argument("--cores", type=int, help="measure in this process, on this many cores")
    given = parser.parse_args()
    if given.cores:
        for vocab_size in given.vocab_size:
            measure(given.source, vocab_size)
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    usable = sorted(os.sched_getaffinity(0))
    for cores in (1, 2):
        allowed = usable[:cores]
        here = [sys.executable, __file__, "--source", given.source, "--cores", str(cores)]
        with tempfile.TemporaryDirectory() as cache:
            subprocess.run(
                [*here, "--vocab_size", *map(str, given.vocab_size)],
                check=True,
                preexec_fn=lambda allowed=allowed: os.sched_setaffinity(0, allowed),
                env={**os.environ, "HF_DATASETS_CACHE": cache, "RAYON_NUM_THREADS": str(cores)},
            )


if __name__ == "__main__":
    main()
