"""Flags of a run that are not the trainer's, the model's or the data's."""

from jsonargparse import ArgumentParser

from lit_gpt_scratch.callbacks.spike_guard import GuardMode
from lit_gpt_scratch.model.presets import PRESETS


def add_run_flags(parser: ArgumentParser) -> None:
    """Where a run lies, what it begins with or goes on from, and whether it is one."""
    parser.add_argument("--runs", default="runs", help="Folder of all runs.")
    parser.add_argument("--experiment", default="pretrain", help="Runs are numbered within an experiment.")
    parser.add_argument(
        "--ckpt_path",
        type=str | None,
        default=None,
        help="Go on from a checkpoint, in its run folder and with its flags: a file, a run folder, or 'last' "
        "for the newest run of this experiment; 'auto' for the newest, or a new one where there is none.",
    )
    parser.add_argument(
        "--preset",
        type=str | None,
        default=None,
        help=f"Begin with the shape of a model by name; flags and configs go over it: {', '.join(PRESETS)}.",
    )
    parser.add_argument(
        "--tensor_parallel",
        type=int | None,
        default=None,
        help="Processes that share the heads of one copy of the model, for --trainer.strategy tp (by default all of "
        "them) and fsdp2_tp (2).",
    )
    parser.add_argument(
        "--guard",
        type=GuardMode,
        default="warn",
        help="Look at each step before it is done, and say if it is not finite or stands out; 'act' also leaves it "
        "out, and rewinds to the last good checkpoint where leaving out does not help.",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="Go on from a checkpoint though text, seed, model or optimizer are not what they were.",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="Say what the run would do and cost, time a few steps, and stop; no run is left behind.",
    )
