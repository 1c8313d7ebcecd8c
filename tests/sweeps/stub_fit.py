"""A stub of ``fit`` for tests of sweeps: writes the same folders and files in a tenth of a second.

Flags: ``x`` and ``kind`` determine the metric, ``seconds`` the duration, ``fails`` is the seed that fails, with the
``failure`` (see ``fail``), unless the file ``repaired`` exists in the working directory. Every start appends its
process id to ``started`` in the experiment's folder. With ``parameters``, the metric follows ``scaling_loss``, and
``trainer.max_steps`` determines the number of tokens.
"""

import errno
import json
import os
import random
import signal
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lit_gpt_scratch.cli import entrypoint
from lit_gpt_scratch.errors import UserError

METRIC = "val/bits_per_byte"
STEPS = 5


def metric_of(x: float, kind: str, seed: int) -> float:
    """The final metric: best at x = 3, with 0.01 between seeds."""
    return 1.0 + (x - 3.0) ** 2 + (0.5 if kind == "b" else 0.0) + 0.01 * (seed % 5)


def scaling_loss(parameters: float, tokens: float, seed: int) -> float:
    """The final metric of a ladder: a scaling law, with noise of 0.002 between seeds."""
    noise = random.Random(f"{parameters} {tokens} {seed}").gauss(0.0, 0.002)
    return 1.0 + 40.0 * parameters**-0.3 + 50.0 * tokens**-0.35 + noise


def fail(failure: str) -> None:
    """Fail as ``fit`` may fail."""
    match failure:
        case "settings":
            sys.exit("error: this seed fails")
        case "user error":
            raise UserError("this seed fails")
        case "bug":
            raise ZeroDivisionError("this seed fails")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "disk full while writing":
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise UserError("cannot write the checkpoint") from error
        case "text missing":
            try:
                Path("nothing").read_text()
            except OSError as error:
                raise UserError("no such file or folder: nothing") from error
        case "timeout":
            raise RuntimeError("[gloo] Timed out waiting 1800000ms for recv operation to complete")
        case "worker killed":
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


def main() -> None:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    seed = int(flags["seed_everything"])
    experiment = Path(flags["runs"], flags["experiment"])
    experiment.mkdir(parents=True, exist_ok=True)
    with (experiment / "started").open("a") as started:
        started.write(f"{os.getpid()}\n")
    if flags.get("fails") == str(seed) and not Path("repaired").exists():
        fail(flags.get("failure", "settings"))
    versions = len(list(experiment.glob("version_*")))
    folder = experiment / f"version_{versions}"
    folder.mkdir()
    value = metric_of(float(flags.get("x", 0)), flags.get("kind", "a"), seed)
    sizes: dict[str, float] = {"tokens": 100 * STEPS}
    if "parameters" in flags:
        parameters, tokens = float(flags["parameters"]), 100 * float(flags["trainer.max_steps"])
        sizes = {"parameters": parameters, "tokens": tokens, "flops_per_token": 6 * parameters}
        value = scaling_loss(parameters, tokens, seed)
    provenance = {"sessions": [{"started": datetime.now(timezone.utc).isoformat()}]}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    writer = EventFileWriter(str(folder))
    for step in range(STEPS):
        point = Summary(value=[Summary.Value(tag=METRIC, simple_value=value + STEPS - 1 - step)])
        writer.add_event(Event(wall_time=time.time(), step=step, summary=point))
        writer.flush()
        time.sleep(float(flags.get("seconds", 0)) / STEPS)
    writer.close()
    summary = {METRIC: value, "val/loss": value, "step": STEPS, **sizes, "seconds": 0.1}
    stopped = flags.get("guard_stops") == str(seed) and not Path("repaired").exists()
    if stopped:
        summary["stopped"] = "guard"
    unfinished = folder / "unfinished"
    unfinished.write_text(json.dumps(summary))
    unfinished.replace(folder / "summary.json")
    if stopped:
        sys.exit(3)


if __name__ == "__main__":
    entrypoint.run(main)
