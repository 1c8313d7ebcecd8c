"""``doctor``: does a configuration keep its promises on this machine?"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lit_gpt_scratch.callbacks.stopping import ending_at_once
from lit_gpt_scratch.checkpoint.kills import KillTest
from lit_gpt_scratch.cli.door import Flags
from lit_gpt_scratch.errors import UserError

DEFAULTS = ("--trainer.max_steps=30", "--trainer.val_check_interval=10", "--checkpoint.every_n_steps=4")
"""A run that is short and saves often, unless the user's own flags say otherwise."""


def main(args: Sequence[str] | None = None) -> None:
    """Kill and resume the run that the flags of ``fit`` describe, and compare it with an undisturbed one."""
    flags = Flags(
        prog="python -m lit_gpt_scratch.doctor",
        description="Kill a run at random moments with SIGKILL, resume it, and compare its last checkpoint and its "
        "curves, bit by bit, with those of a run that nothing disturbed.",
        epilog=f"All other flags are those of fit, and go over {' '.join(DEFAULTS)}.",
    )
    flags.add_argument("--resume", action="store_true", required=True, help="examine whether resuming is exact")
    flags.add_argument("--kills", type=int, default=6, help="how often to kill")
    flags.add_argument("--seed", type=int, default=0, help="of the moments")
    given, of_fit = flags.parse_known_args(args)
    if given.kills < 1:
        raise UserError(f"argument --kills: {given.kills}; it must be at least 1")
    taken = [flag for flag in of_fit if flag.split("=")[0] in ("--runs", "--ckpt_path", "--experiment", "--plan")]
    if taken:
        raise UserError(f"{taken[0]} is the doctor's to choose: its runs are kept nowhere")
    with ending_at_once(), tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        test = KillTest([*DEFAULTS, *of_fit], Path(folder), given.seed)
        with tqdm(total=given.kills, unit="kill", disable=not sys.stderr.isatty()) as bar:
            report = test.run(given.kills, lambda: bar.update())
    print(report)
    if report.differences:
        sys.exit(1)
