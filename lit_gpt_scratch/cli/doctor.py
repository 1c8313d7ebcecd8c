"""``doctor``: diagnose a run, check or measure this machine, or test ``fit``.

One test checks that a run that was killed and resumed is identical to an uninterrupted run. Another test checks that
all training strategies compute the same results. The third checks that activations have the same scale at each width.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from platformdirs import user_cache_path
from tqdm import tqdm

from lit_gpt_scratch.acceptance.scheduler import USUAL_MINUTES, AcceptanceRun
from lit_gpt_scratch.callbacks.signal_handling import exit_on_signal
from lit_gpt_scratch.checkpoint.resume_stress_test import ResumeStressTest
from lit_gpt_scratch.cli.entrypoint import CommandParser
from lit_gpt_scratch.diagnostics.rule_engine import RuleEngine
from lit_gpt_scratch.diagnostics.rules import RULES
from lit_gpt_scratch.diagnostics.tensorboard_reader import replay_events
from lit_gpt_scratch.distributed.hardware_defaults import configure_process
from lit_gpt_scratch.distributed.layout_parity import ARITHMETIC_CASES, LAYOUTS, LayoutParity
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.profiling.coordinate_check import SEEDS, WIDTHS, check_coordinates
from lit_gpt_scratch.profiling.device_check import RELATIVE_TOLERANCES, compare_devices, describe_machine

RESUME_DEFAULTS = ("--trainer.max_steps=30", "--trainer.val_check_interval=10", "--checkpoint.every_n_steps=4")
"""Flags for a short run that saves checkpoints often; the user's flags override them."""
PARITY_DEFAULTS = (
    "--trainer.accelerator=cpu", "--trainer.max_steps=50", "--trainer.limit_val_batches=0", "--data.block_size=64",
    "--model.gpt.n_layer=2", "--model.gpt.n_head=4", "--model.gpt.n_embd=64", "--model.gpt.initialisation=gpt2",
    "--model.compile=false",
)  # fmt: skip
"""Flags for a small model in which every weight has a gradient from the first step; the user's flags override them."""
COORDINATE_DEFAULTS = (
    "--trainer.accelerator=cpu", "--model.gpt.n_layer=2", "--model.gpt.n_head=4", "--model.gpt.n_embd=64",
)  # fmt: skip
"""Flags for a shallow model whose heads are small enough for narrow widths; the user's flags override them."""
COORDINATE_FLAGS = ("--model.gpt", "--model.optimizer", "--config", "--preset")
"""Flags of ``fit`` that have an effect with ``--coordinates``."""
OPTIONS = {
    "kills": "--resume", "seed": "--resume", "kinds": "--parity", "layouts": "--parity", "minutes": "--acceptance",
    "out": "--acceptance", "text": "--acceptance", "rows": "--acceptance", "widths": "--coordinates",
    "plot": "--coordinates",
}  # fmt: skip
"""Flag that each option requires, keyed by option name."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the ``doctor`` command: diagnose a run, check this machine, or test ``fit`` with the given flags."""
    args = sys.argv[1:] if args is None else list(args)
    parser = CommandParser(
        prog="python -m lit_gpt_scratch.doctor",
        description="Without flags: describe this machine, and check that its devices compute the same results as a "
        "CPU in float32. With RUN: diagnose the curves of a run. With --resume: kill a run with SIGKILL at random "
        "times, resume it, and compare its last checkpoint and curves bit for bit with those of an uninterrupted run. "
        "With --parity: run the same steps in every layout of processes and micro-batches, and compare losses and "
        "gradients. With --acceptance: measure this machine's GPU within a time limit, from matrix products to "
        "training, decoding and resuming, and write acceptance.json and acceptance.md after each row. With "
        "--coordinates: train narrow and wide models for a few steps, and check that their activations have the same "
        "scale, so that hyperparameters can be transferred across widths (--model.gpt.parametrisation mup).",
        epilog=f"All other flags are passed to fit. They override the defaults {' '.join(RESUME_DEFAULTS)} "
        f"with --resume, {' '.join(PARITY_DEFAULTS)} with --parity, and {' '.join(COORDINATE_DEFAULTS)} with "
        "--coordinates.",
    )
    tests = parser.add_mutually_exclusive_group()
    tests.add_argument(
        "--resume", action="store_true", help="test that a resumed run is identical to an uninterrupted run"
    )
    tests.add_argument("--parity", action="store_true", help="test that all strategies compute the same results")
    tests.add_argument("--acceptance", action="store_true", help="measure and check everything on this machine's GPU")
    tests.add_argument(
        "--coordinates", action="store_true", help="test that activations have the same scale at each width"
    )
    takes_fit_flags = not {"--resume", "--parity", "--coordinates"}.isdisjoint(args)
    if not takes_fit_flags:  # otherwise, a positional word is the value of a flag of fit
        parser.add_argument(
            "run", metavar="RUN", nargs="?", type=Path, help="run folder, or any folder with TensorBoard events"
        )
        parser.add_argument(
            "--json", action="store_true", help="with RUN: print the diagnoses as JSON, formatted like doctor.json"
        )
    resume, parity = parser.add_argument_group("with --resume"), parser.add_argument_group("with --parity")
    resume.add_argument("--kills", type=int, default=6, help="number of times to kill the run")
    resume.add_argument("--seed", type=int, default=0, help="seed for the random kill times")
    parity.add_argument(
        "--kinds",
        nargs="+",
        choices=ARITHMETIC_CASES,
        default=list(ARITHMETIC_CASES),
        help="precisions and optimizers to compare",
    )
    parity.add_argument(
        "--layouts",
        nargs="+",
        choices=LAYOUTS,
        default=list(LAYOUTS),
        help="layouts of processes and micro-batches to compare with a single process",
    )
    acceptance = parser.add_argument_group("with --acceptance")
    acceptance.add_argument("--minutes", type=float, default=USUAL_MINUTES, help="time limit of all rows together")
    acceptance.add_argument("--out", type=Path, default=Path("acceptance"), help="folder for the reports")
    acceptance.add_argument(
        "--text", metavar="FILE", type=Path, help="tiny Shakespeare, for the time to nanoGPT's loss"
    )
    acceptance.add_argument(
        "--rows",
        metavar="PATTERN",
        nargs="+",
        default=[],
        help="measure only the rows whose names match one of these regular expressions, and keep the other rows of "
        "the reports in the folder",
    )
    coordinates = parser.add_argument_group("with --coordinates")
    coordinates.add_argument(
        "--widths", type=int, nargs="+", default=list(WIDTHS), help="values of model.gpt.n_embd to compare"
    )
    coordinates.add_argument(
        "--plot", metavar="FILE", type=Path, default=Path("coordinates.png"), help="file for the plot"
    )
    given, fit_flags = parser.parse_known_args(args)
    names = ("resume", "parity", "acceptance", "coordinates")
    test = next((f"--{name}" for name in names if getattr(given, name)), None)
    for name, belongs_to in OPTIONS.items():
        if test != belongs_to and getattr(given, name) != parser.get_default(name):
            raise UserError(f"argument --{name} requires {belongs_to}; add {belongs_to}, or omit --{name}")
    if test == "--acceptance":
        _run_acceptance(given, fit_flags)
        return
    if test == "--coordinates":
        if not _check_coordinates(given, fit_flags):
            sys.exit(1)
        return
    if test is None:
        if fit_flags:
            required = "`fit` flags require --resume, --parity or --coordinates"
            raise UserError(f"unrecognized arguments: {' '.join(fit_flags)} ({required})")
        if given.json and given.run is None:
            raise UserError("argument --json requires a run folder; pass RUN")
        healthy = _check_machine() if given.run is None else _diagnose_run(given.run, given.json)
        if not healthy:
            sys.exit(1)
        return
    if given.kills < 1:
        raise UserError(f"argument --kills is {given.kills}; it must be 1 or more")
    taken = [flag for flag in fit_flags if flag.split("=")[0] in ("--runs", "--ckpt_path", "--experiment", "--plan")]
    if taken:
        raise UserError(f"{taken[0]} is not supported by doctor, because its runs are temporary; omit it")
    with exit_on_signal(), tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        run_test = _test_parity if given.parity else _test_resume
        if not run_test(given, fit_flags, Path(folder)):
            sys.exit(1)


def _run_acceptance(given: argparse.Namespace, fit_flags: Sequence[str]) -> None:
    """Run the acceptance rows; exit with code 1 if a row failed."""
    unknown = [*([str(given.run)] if given.run else []), *(["--json"] if given.json else []), *fit_flags]
    if unknown:
        raise UserError(f"unrecognized arguments with --acceptance: {' '.join(unknown)}; omit them")
    from lit_gpt_scratch.acceptance.rows import ROWS  # imports everything that a row may measure

    with exit_on_signal():
        records = AcceptanceRun(ROWS, given.out, given.minutes, given.text, patterns=given.rows).run()
    if any(record["status"] == "failed" for record in records):
        sys.exit(1)


def _diagnose_run(run: Path, as_json: bool) -> bool:
    """Print the diagnoses of a run; return True, because finding problems is not a failure of the command."""
    engine = RuleEngine(RULES)
    replay_events(run, engine)
    if not any(len(engine.history[name]) for rule in RULES for name in rule.reads):
        raise UserError(f"{run} contains none of the curves that doctor reads, such as train/loss; pass a run folder")
    engine.finish()
    if as_json:
        print(json.dumps([diagnosis.to_dict() for diagnosis in engine.diagnoses], indent=2))
        return True
    for diagnosis in engine.diagnoses:
        print(f"step {diagnosis.step}: {diagnosis.symptom}\n  likely  {diagnosis.cause}\n  try     {diagnosis.flag}")
    if not engine.diagnoses:
        print(f"no problem found in the curves of {run}: {engine.history.step + 1:,} steps")
    return True


def _check_machine() -> bool:
    """Print a description of the machine; return whether all tested devices compute the same results as the CPU."""
    configure_process()
    for name, text in describe_machine({"runs": Path("runs"), "tokens": user_cache_path("lit_gpt_scratch")}):
        print(f"{name:14} {text}")
    healthy = True
    for found in compare_devices():
        what = f"relative difference from float32 on the CPU: loss {found.loss:.1e}, gradient {found.gradient:.1e}"
        limit = RELATIVE_TOLERANCES[found.dtype]
        verdict = (
            "within tolerance"
            if found.within_tolerance
            else f"above the tolerance of {limit:.0e}; do not train on this device in this dtype"
        )
        dtype = str(found.dtype).removeprefix("torch.")
        print(f"{found.device + ', ' + dtype:14} {found.failed or f'{what}, {verdict}'}")
        healthy = healthy and (found.within_tolerance or bool(found.failed))
    return healthy


def _test_resume(given: argparse.Namespace, fit_flags: Sequence[str], folder: Path) -> bool:
    test = ResumeStressTest([*RESUME_DEFAULTS, *fit_flags], folder, given.seed)
    with tqdm(total=given.kills, unit="kill", disable=not sys.stderr.isatty()) as bar:
        report = test.run(given.kills, lambda: bar.update())
    print(report)
    return not report.differences


def _test_parity(given: argparse.Namespace, fit_flags: Sequence[str], folder: Path) -> bool:
    parity = LayoutParity([*PARITY_DEFAULTS, *fit_flags], folder, given.kinds, given.layouts)
    with tqdm(total=parity.runs, unit="run", disable=not sys.stderr.isatty()) as bar:
        parity.run(lambda: bar.update())
    print(parity)
    for what in parity.violations:
        print(f"differs: {what}")
    return not parity.violations


def _check_coordinates(given: argparse.Namespace, fit_flags: Sequence[str]) -> bool:
    """Print the scales of activations at each width and save their plot; return whether all of them are flat."""
    from lit_gpt_scratch.cli.fit import FitCLI  # slow to import
    from lit_gpt_scratch.tasks.gpt_module import GPTModule

    unused = [flag for flag in fit_flags if flag.startswith("--") and not flag.startswith(COORDINATE_FLAGS)]
    if unused:
        raise UserError(f"{unused[0]} has no effect with --coordinates, which trains on random tokens; omit it")
    task = FitCLI([*COORDINATE_DEFAULTS, *fit_flags]).model
    if not isinstance(task, GPTModule):
        raise UserError(f"{type(task).__name__} has no model.gpt; --coordinates requires a task of this package")
    with tqdm(total=len(set(given.widths)) * len(SEEDS), unit="run", disable=not sys.stderr.isatty()) as bar:
        check = check_coordinates(task.gpt, task.optimizer, given.widths, on_run=lambda: bar.update())
    try:
        if find_spec("matplotlib") is None:
            print("no plot: it requires matplotlib; install with: python -m pip install -e '.[sweep]'", file=sys.stderr)
        else:
            check.save_plot(given.plot)
    except (OSError, ValueError) as error:  # the folder does not exist, or the file extension is unknown
        raise UserError(f"argument --plot: cannot write {given.plot}: {error}; choose another file") from error
    print(check)
    print(check.verdict)
    return not check.not_flat
