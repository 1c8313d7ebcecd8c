"""``sweep``: run all trials of a sweep file and report the results, or compare existing runs."""

import argparse
import logging
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lit_gpt_scratch.cli.entrypoint import CommandParser
from lit_gpt_scratch.distributed.stop_signals import install_stop_handler
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.text.process_pool import shutdown_process_pool, start_process_pool

if TYPE_CHECKING:
    from lit_gpt_scratch.sweeps.fit_command import ResolvedBaseline
    from lit_gpt_scratch.sweeps.sweep_config import SweepConfig

log = logging.getLogger(__name__)

REQUIRED_MODULES = ("optuna", "sklearn", "scipy", "matplotlib", "psycopg")


def main(args: Sequence[str] | None = None, module: str | None = None) -> None:
    """Run the ``sweep`` command.

    Args:
        args: Command-line arguments, or None to use ``sys.argv``.
        module: Module that the runs execute instead of ``fit``, for testing sweeps; its flags are not checked.
    """
    arguments = _build_parser().parse_args(args)
    if (arguments.file is None) == (arguments.compare is None):
        raise UserError("pass either a sweep file, or run folders after --compare (see --help)")
    if arguments.compare and arguments.retry:
        raise UserError("argument --retry requires a sweep file; it cannot be combined with --compare")
    if arguments.workers < 1:
        raise UserError(f"argument --workers is {arguments.workers}; it must be 1 or more")
    missing = [name for name in REQUIRED_MODULES if find_spec(name) is None]
    if missing:
        raise UserError(f"sweep requires {', '.join(missing)}; install with: python -m pip install -e '.[sweep]'")
    if arguments.compare:
        _compare(arguments)
    else:
        _sweep(arguments, module)


def _build_parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m lit_gpt_scratch.sweep",
        description="Run all trials of a sweep file, each run in its own process and folder, and report the "
        "results. Repeat the command to resume a sweep that was killed or stopped; finished runs are not repeated. "
        "The exit code is 1 if a run failed. "
        "Several processes can run the command to share a sweep, even on several machines with --storage "
        "postgresql://...",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="sweep file in YAML")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that contains all runs and sweeps")
    parser.add_argument("--workers", type=int, default=1, help="number of concurrent runs, which share the CPU cores")
    parser.add_argument(
        "--storage", help="storage for the study: a file (by default in the sweep's folder), sqlite:///FILE or "
        "postgresql://USER:PASSWORD@HOST/DATABASE",
    )  # fmt: skip
    parser.add_argument(
        "--retry",
        choices=("failed",),
        help="first discard the results of failed runs, so that they are executed again; runs that failed because of "
        "their environment (killed, disk full, file missing) are always executed again",
    )
    compare = parser.add_argument_group("comparison of existing runs")
    compare.add_argument("--compare", metavar="RUN", nargs="+", type=Path, help="run folders to compare")
    compare.add_argument("--metric", default="val/bits_per_byte", help="metric to compare: a key of summary.json")
    compare.add_argument(
        "--direction",
        choices=("minimize", "maximize"),
        default="minimize",
        help="whether lower or higher values are better",
    )
    return parser


def _sweep(arguments: argparse.Namespace, module: str | None) -> None:
    from lit_gpt_scratch.sweeps.build_report import build_study_report
    from lit_gpt_scratch.sweeps.fit_command import FIT_MODULE, ResolvedBaseline
    from lit_gpt_scratch.sweeps.runner import SweepRunner
    from lit_gpt_scratch.sweeps.storage import JOURNAL, open_storage, storage_errors
    from lit_gpt_scratch.sweeps.study import Study
    from lit_gpt_scratch.sweeps.sweep_config import load_sweep

    sweep = load_sweep(arguments.file)
    folder: Path = arguments.runs / sweep.name
    baseline = ResolvedBaseline() if module else None
    if baseline is None and arguments.storage is None and not (folder / JOURNAL).exists():
        baseline = _precheck(sweep)  # before writing anything to disk
    study = Study(sweep, *open_storage(arguments.storage, folder, f"{sweep.name}-{sweep.fingerprint}"))
    if study.baseline is None:
        study.create(baseline or _precheck(sweep))
    assert study.baseline is not None
    runner = SweepRunner(sweep, study, folder, study.baseline, arguments.workers, module or FIT_MODULE)
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        runner.stopping.set()

    previous_handlers = install_stop_handler(stop)
    try:
        with storage_errors(arguments.storage):
            if arguments.retry:
                log.info("%d failed runs will be executed again", study.reset_failed_runs())
            if not study.is_finished:
                runner.run()
            report = build_study_report(study, arguments.file)
    finally:
        for signum, handler in previous_handlers.items():
            signal.signal(signum, handler)
    states = Counter(trial.state for trial in report.trials)
    others = "".join(f", {states[state]} {state}" for state in ("failed", "pruned") if states[state])
    log.info("%d of %d trials finished%s; report: %s", states["finished"], sweep.n_trials, others, report.write(folder))
    if failures := report.describe_failures():
        log.warning("%s", failures)
    if runner.stopping.is_set():
        log.info("stopped; repeat the command to resume")
        sys.exit(128 + (received[0] if received else signal.SIGTERM))
    if failures:
        sys.exit(1)


def _precheck(sweep: "SweepConfig") -> "ResolvedBaseline":
    """Check the flags in a separate process, because parsing imports torch, which the sweep itself does not use."""
    pool = start_process_pool(1)
    try:
        return pool.submit(_check_in_subprocess, sweep).result()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        shutdown_process_pool(pool)


def _check_in_subprocess(sweep: "SweepConfig") -> "ResolvedBaseline":
    from lit_gpt_scratch.cli.sweep_precheck import check_sweep

    return check_sweep(sweep)


def _compare(arguments: argparse.Namespace) -> None:
    from lit_gpt_scratch.sweeps.build_report import build_comparison_report

    report = build_comparison_report(arguments.compare, arguments.metric, arguments.direction)
    log.info("report: %s", report.write(arguments.runs / "comparison"))
