"""A stub of ``fit`` for tests of sweeps: writes the same folders and files in a tenth of a second.

Flags: ``x`` and ``kind`` determine the metric, ``seconds`` the duration, ``fails`` is the seed that fails. Every start
appends its process id to ``started`` in the experiment's folder.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

METRIC = "val/bits_per_byte"
STEPS = 5


def metric_of(x: float, kind: str, seed: int) -> float:
    """The final metric: best at x = 3, with 0.01 between seeds."""
    return 1.0 + (x - 3.0) ** 2 + (0.5 if kind == "b" else 0.0) + 0.01 * (seed % 5)


def main() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    seed = int(flags["seed_everything"])
    experiment = Path(flags["runs"], flags["experiment"])
    experiment.mkdir(parents=True, exist_ok=True)
    with (experiment / "started").open("a") as started:
        started.write(f"{os.getpid()}\n")
    if flags.get("fails") == str(seed):
        sys.exit("error: this seed fails")
    folder = experiment / "version_0"
    folder.mkdir(exist_ok=True)
    value = metric_of(float(flags.get("x", 0)), flags.get("kind", "a"), seed)
    writer = EventFileWriter(str(folder))
    for step in range(STEPS):
        point = Summary(value=[Summary.Value(tag=METRIC, simple_value=value + STEPS - 1 - step)])
        writer.add_event(Event(wall_time=time.time(), step=step, summary=point))
        writer.flush()
        time.sleep(float(flags.get("seconds", 0)) / STEPS)
    writer.close()
    summary = {METRIC: value, "val/loss": value, "step": STEPS, "tokens": 100 * STEPS, "seconds": 0.1}
    unfinished = folder / "unfinished"
    unfinished.write_text(json.dumps(summary))
    unfinished.replace(folder / "summary.json")


if __name__ == "__main__":
    main()
