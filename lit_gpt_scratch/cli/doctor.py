"""``doctor``: what is wrong with a run, what this machine can do, and whether a configuration keeps its promises."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from platformdirs import user_cache_path
from tqdm import tqdm

from lit_gpt_scratch.callbacks.signal_handling import exit_on_signal
from lit_gpt_scratch.checkpoint.resume_stress_test import ResumeStressTest
from lit_gpt_scratch.cli.entrypoint import CommandParser
from lit_gpt_scratch.diagnostics.rule_engine import RuleEngine
from lit_gpt_scratch.diagnostics.rules import RULES
from lit_gpt_scratch.diagnostics.tensorboard_reader import replay_events
from lit_gpt_scratch.distributed.hardware_defaults import configure_process
from lit_gpt_scratch.distributed.layout_parity import ARITHMETIC_CASES, LAYOUTS, LayoutParity
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.profiling.device_check import RELATIVE_TOLERANCES, compare_devices, describe_machine

RESUME_DEFAULTS = ("--trainer.max_steps=30", "--trainer.val_check_interval=10", "--checkpoint.every_n_steps=4")
"""A run that is short and saves often, unless the user's own flags say otherwise."""
PARITY_DEFAULTS = (
    "--trainer.accelerator=cpu", "--trainer.max_steps=50", "--trainer.limit_val_batches=0", "--data.block_size=64",
    "--model.gpt.n_layer=2", "--model.gpt.n_head=4", "--model.gpt.n_embd=64", "--model.gpt.initialisation=gpt2",
    "--model.compile=false",
)  # fmt: skip
"""A small model, all of whose weights have a gradient from the first step on, unless the user's flags say otherwise."""

RESUME_FLAGS, PARITY_FLAGS = ("kills", "seed"), ("kinds", "layouts")
"""Flags of the one and of the other."""


def main(args: Sequence[str] | None = None) -> None:
    """Examine a run that there is, this machine, or the run that the flags of ``fit`` describe."""
    args = sys.argv[1:] if args is None else list(args)
    flags = CommandParser(
        prog="python -m lit_gpt_scratch.doctor",
        description="Without flags: what this machine has, and whether it computes what a CPU does in float32. RUN: "
        "what its curves say is wrong with it. --resume: kill a run at random moments with SIGKILL, resume it, and "
        "compare its last checkpoint and its curves, bit by bit, with those of a run that nothing disturbed. --parity: "
        "lay the same steps out over processes and micro-batches in every way, and compare losses and gradients.",
        epilog=f"All other flags are those of fit. They go over {' '.join(RESUME_DEFAULTS)} for --resume, and over "
        f"{' '.join(PARITY_DEFAULTS)} for --parity.",
    )
    examination = flags.add_mutually_exclusive_group()
    examination.add_argument("--resume", action="store_true", help="whether resuming is exact")
    examination.add_argument("--parity", action="store_true", help="whether all strategies compute the same")
    if not {"--resume", "--parity"} & set(args):  # there a word without a flag is the value of one of fit's
        flags.add_argument("run", metavar="RUN", nargs="?", type=Path, help="a run's folder, or one with events of any")
        flags.add_argument("--json", action="store_true", help="of a run: as in doctor.json")
    resume, parity = flags.add_argument_group("of --resume"), flags.add_argument_group("of --parity")
    resume.add_argument("--kills", type=int, default=6, help="how often to kill")
    resume.add_argument("--seed", type=int, default=0, help="of the moments")
    parity.add_argument(
        "--kinds",
        nargs="+",
        choices=ARITHMETIC_CASES,
        default=list(ARITHMETIC_CASES),
        help="of arithmetic to compare in",
    )
    parity.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="to compare with single")
    given, of_fit = flags.parse_known_args(args)
    if not (given.resume or given.parity):
        if of_fit:
            raise UserError(f"unrecognized arguments: {' '.join(of_fit)} (flags of fit go with --resume or --parity)")
        if given.json and given.run is None:
            raise UserError("argument --json is of a run; name its folder")
        for name in (*RESUME_FLAGS, *PARITY_FLAGS):
            if getattr(given, name) != flags.get_default(name):
                raise UserError(f"argument --{name} is of {'--resume' if name in RESUME_FLAGS else '--parity'}")
        healthy = _check_machine() if given.run is None else _diagnose_run(given.run, given.json)
        if not healthy:
            sys.exit(1)
        return
    for name in PARITY_FLAGS if given.resume else RESUME_FLAGS:
        if getattr(given, name) != flags.get_default(name):
            raise UserError(f"argument --{name} is of {'--parity' if given.resume else '--resume'}")
    if given.kills < 1:
        raise UserError(f"argument --kills: {given.kills}; it must be at least 1")
    taken = [flag for flag in of_fit if flag.split("=")[0] in ("--runs", "--ckpt_path", "--experiment", "--plan")]
    if taken:
        raise UserError(f"{taken[0]} is the doctor's to choose: its runs are kept nowhere")
    with exit_on_signal(), tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        examine = _test_parity if given.parity else _test_resume
        if not examine(given, of_fit, Path(folder)):
            sys.exit(1)


def _diagnose_run(run: Path, as_json: bool) -> bool:
    """What is wrong with a run; True whatever that is: it has been said."""
    examination = RuleEngine(RULES)
    replay_events(run, examination)
    if not any(len(examination.evidence[name]) for row in RULES for name in row.reads):
        raise UserError(f"{run} has none of the curves that the doctor reads, such as train/loss; nothing can be said")
    examination.end()
    if as_json:
        print(json.dumps([diagnosis.plain() for diagnosis in examination.found], indent=2))
        return True
    for diagnosis in examination.found:
        print(f"step {diagnosis.step}: {diagnosis.symptom}\n  likely  {diagnosis.cause}\n  try     {diagnosis.flag}")
    if not examination.found:
        print(f"nothing is wrong with {run}, as far as its curves tell: {examination.evidence.step + 1:,} steps")
    return True


def _check_machine() -> bool:
    """What it has; whether everything on it computes alike."""
    configure_process()
    for name, text in describe_machine({"runs": Path("runs"), "tokens": user_cache_path("lit_gpt_scratch")}):
        print(f"{name:14} {text}")
    healthy = True
    for found in compare_devices():
        what = f"loss {found.loss:.1e}, gradient {found.gradient:.1e} off a CPU in float32"
        limit = RELATIVE_TOLERANCES[found.dtype]
        verdict = "as it should be" if found.within_tolerance else f"more than {limit:.0e}: do not train in it here"
        dtype = str(found.dtype).removeprefix("torch.")
        print(f"{found.device + ', ' + dtype:14} {found.failed or f'{what}, {verdict}'}")
        healthy = healthy and (found.within_tolerance or bool(found.failed))
    return healthy


def _test_resume(given: argparse.Namespace, of_fit: Sequence[str], folder: Path) -> bool:
    test = ResumeStressTest([*RESUME_DEFAULTS, *of_fit], folder, given.seed)
    with tqdm(total=given.kills, unit="kill", disable=not sys.stderr.isatty()) as bar:
        report = test.run(given.kills, lambda: bar.update())
    print(report)
    return not report.differences


def _test_parity(given: argparse.Namespace, of_fit: Sequence[str], folder: Path) -> bool:
    parity = LayoutParity([*PARITY_DEFAULTS, *of_fit], folder, given.kinds, given.layouts)
    with tqdm(total=parity.runs, unit="run", disable=not sys.stderr.isatty()) as bar:
        parity.run(lambda: bar.update())
    print(parity)
    for what in parity.violations:
        print(f"not the same: {what}")
    return not parity.violations
