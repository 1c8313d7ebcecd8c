"""``sweep``: many runs from one file, and a report of what they show."""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lit_gpt_scratch.cli.entrypoint import CommandParser
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.process_pool import shutdown_process_pool, start_process_pool

if TYPE_CHECKING:
    from lit_gpt_scratch.sweeps.build_command import ResolvedBaseline
    from lit_gpt_scratch.sweeps.sweep_config import Sweep

log = logging.getLogger(__name__)

NEEDED = ("optuna", "sklearn", "scipy", "matplotlib", "psycopg")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main(args: Sequence[str] | None = None, module: str | None = None) -> None:
    """The door ``sweep``.

    Args:
        args: Its flags.
        module: What runs are processes of; tests of the sweep itself have a quicker one, whose flags nobody checks.
    """
    given = _flags().parse_args(args)
    if (given.file is None) == (given.compare is None):
        raise UserError("name a sweep file, or runs after --compare (see --help)")
    if given.workers < 1:
        raise UserError(f"argument --workers: {given.workers}; it must be at least 1")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"a sweep needs {', '.join(missing)}: python -m pip install -e '.[sweep]'")
    if given.compare:
        _compare(given)
    else:
        _sweep(given, module)


def _flags() -> CommandParser:
    flags = CommandParser(
        prog="python -m lit_gpt_scratch.sweep",
        description="Run every trial of a sweep file, each run a process and a folder of its own, and report what they "
        "show. The same command goes on where a kill or Ctrl-C stopped it, repeats nothing, and may be given several "
        "times at once, on several machines with --storage postgresql://...",
    )
    flags.add_argument("file", metavar="FILE", nargs="?", type=Path, help="what varies over what: a YAML file")
    flags.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs; a sweep is a folder in it")
    flags.add_argument("--workers", type=int, default=1, help="runs side by side, which share the cores")
    flags.add_argument(
        "--storage", help="where the study is kept: a file (by default in the sweep's folder), sqlite:///FILE or "
        "postgresql://USER:PASSWORD@HOST/DATABASE",
    )  # fmt: skip
    compare = flags.add_argument_group("of runs that are there already")
    compare.add_argument("--compare", metavar="RUN", nargs="+", type=Path, help="folders of runs to report on")
    compare.add_argument("--metric", default="val/bits_per_byte", help="of their summary.json")
    compare.add_argument("--direction", choices=("minimize", "maximize"), default="minimize", help="of the metric")
    return flags


def _sweep(given: argparse.Namespace, module: str | None) -> None:
    from lit_gpt_scratch.sweeps.build_command import FIT, ResolvedBaseline
    from lit_gpt_scratch.sweeps.build_report import build_study_report
    from lit_gpt_scratch.sweeps.runner import SweepRunner
    from lit_gpt_scratch.sweeps.storage import JOURNAL, open_storage, storage_errors
    from lit_gpt_scratch.sweeps.study import Study
    from lit_gpt_scratch.sweeps.sweep_config import load

    sweep = load(given.file)
    folder: Path = given.runs / sweep.name
    known = ResolvedBaseline() if module else None
    if known is None and given.storage is None and not (folder / JOURNAL).exists():
        known = _checked(sweep)  # before anything is written
    study = Study(sweep, *open_storage(given.storage, folder, f"{sweep.name}-{sweep.fingerprint}"))
    if study.known is None:
        study.begin(known or _checked(sweep))
    assert study.known is not None
    conductor = SweepRunner(sweep, study, folder, study.known, given.workers, module or FIT)
    signalled: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        signalled.append(signum)
        conductor.stopping.set()

    before = {signum: signal.signal(signum, stop) for signum in STOP_SIGNALS}
    try:
        with storage_errors(given.storage):
            if not study.over:
                conductor.run()
            report = build_study_report(study, given.file)
            ended = sum(trial.state.is_finished() for trial in study.trials())
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    log.info("%d of %d trials ended; %s", ended, sweep.n_trials, report.write(folder))
    if conductor.stopping.is_set():
        log.info("stopped; the same command goes on")
        sys.exit(128 + (signalled[0] if signalled else signal.SIGTERM))


def _checked(sweep: "Sweep") -> "ResolvedBaseline":
    """What ``fit`` says of the flags, in a process of its own: reading them takes torch, which a sweep does without."""
    pool = start_process_pool(1)
    try:
        return pool.submit(_check, sweep).result()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        shutdown_process_pool(pool)


def _check(sweep: "Sweep") -> "ResolvedBaseline":
    from lit_gpt_scratch.cli.sweep_precheck import check_sweep

    return check_sweep(sweep)


def _compare(given: argparse.Namespace) -> None:
    from lit_gpt_scratch.sweeps.compare_runs import compare

    report = compare(given.compare, given.metric, given.direction)
    log.info("%s", report.write(given.runs / "comparison"))
