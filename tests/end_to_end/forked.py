"""Run ``fit`` in the processes of a launcher, each forked from a process that has only done the imports.

The environment of a process is that of ``torchrun``. A new interpreter would import for three seconds; real ones are
used where signals, kills, or the end of the interpreter are tested.
"""

import importlib
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning.pytorch.callbacks import Callback

from tests.end_to_end.conftest import LONG_SAMPLES, SHORT_SAMPLES, Outcome

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["lit_gpt_scratch.cli.fit", "lit_gpt_scratch.tasks", "lit_gpt_scratch.data"])
LIMIT = 250.0
"""Time limit, in seconds."""


def fit(runs: Path, *flags: str, long_samples: bool = False) -> Outcome:
    """Run ``fit`` in as many processes as the flags say; return the output of rank 0 and the highest exit code.

    Args:
        runs: Folder of the runs.
        flags: Flags of ``fit``.
        long_samples: Whether validations generate samples longer than a context of 32.
    """
    samples = LONG_SAMPLES if long_samples else SHORT_SAMPLES
    devices = [int(flag.partition("=")[2]) for flag in flags if flag.startswith("--trainer.devices=")]
    processes = devices[-1] if devices else 1
    runs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {
        "WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}",
    }  # fmt: skip
    ranks = []
    for rank in range(processes):
        own = {**launched, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"} if processes > 1 else {}
        output = [runs / f".{stream}_{rank}.txt" for stream in ("out", "err")]
        arguments = [*flags, f"--runs={runs}"], {**os.environ, **own}, *output
        ranks.append(FORKS.Process(target=_run, args=arguments, kwargs={"samples": samples}))
    try:
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(LIMIT)
        code = max(128 if each.exitcode is None else abs(each.exitcode) for each in ranks)
    finally:
        for each in ranks:
            each.kill()
            each.join()
    out, err = ((runs / f".{stream}_0.txt").read_text() for stream in ("out", "err"))
    return Outcome(code, out, err)


def run(
    command: Sequence[str], folder: Path, *flags: str, limits: Mapping[int, int] = MappingProxyType({}), **env: str
) -> Outcome:
    """Run a command in a new process.

    Args:
        command: Name of the command, and further arguments of its ``main``.
        folder: Folder for the output.
        flags: Flags of the command.
        limits: Soft limits of the process, keyed by resource, as for ``resource.setrlimit``.
        env: Environment variables to change.
    """
    out, err = (folder / f".{stream}.txt" for stream in ("out", "err"))
    return _wait(_run, list(flags), {**os.environ, **env}, out, err, tuple(command), dict(limits))


def python(script: str, *arguments: str | Path) -> Outcome:
    """Run a script in a new process, as ``python -c`` does, except that modules may be imported already."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, stream) for stream in ("out", "err"))
        return _wait(_execute, script, [str(argument) for argument in arguments], out, err)


def python_processes(script: str, arguments: Sequence[Sequence[str]]) -> list[Outcome]:
    """Run a script in several processes at once, each with its own arguments."""
    with ThreadPoolExecutor(len(arguments)) as threads:
        return list(threads.map(lambda own: python(script, *own), arguments))


def _wait(target: Callable[..., None], *arguments: Any) -> Outcome:
    """Run a function in a new process; the third and the fourth argument are the paths of its output."""
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(LIMIT)
    code = 128 if process.exitcode is None else process.exitcode
    process.kill()
    process.join()
    return Outcome(code, arguments[2].read_text(), arguments[3].read_text())


def _execute(script: str, arguments: list[str], out: Path, err: Path) -> None:
    import torch

    torch.set_num_threads(1)
    sys.argv = ["-c", *arguments]
    _redirect(out, err)
    exec(script, {"__name__": "__main__"})
    sys.stdout.flush()


def _redirect(out: Path, err: Path) -> None:
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())


def _run(
    flags: list[str],
    environment: dict[str, str],
    out: Path,
    err: Path,
    command: tuple[str, ...] = ("fit",),
    limits: Mapping[int, int] = MappingProxyType({}),
    samples: Callable[..., Callback] = SHORT_SAMPLES,
) -> None:
    import torch

    from lit_gpt_scratch.callbacks import default_callbacks
    from lit_gpt_scratch.cli import entrypoint

    module = importlib.import_module(f"lit_gpt_scratch.cli.{command[0]}")
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    default_callbacks.Samples = samples  # type: ignore[assignment,misc]  # it also returns a callback
    _redirect(out, err)
    if limits:
        import resource

        for number, soft in limits.items():
            resource.setrlimit(number, (soft, resource.getrlimit(number)[1]))
    entrypoint.run(lambda: module.main(flags, *command[1:]))
