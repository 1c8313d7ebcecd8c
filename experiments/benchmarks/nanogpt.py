"""Measure the training time to reach a validation loss on nanoGPT's CPU task, character-level tiny Shakespeare.

    python experiments/benchmarks/nanogpt.py --nanogpt CHECKOUT --text tinyshakespeare.txt

nanoGPT's `train.py` runs unchanged, with the settings for a CPU from its README; this package runs `fit` with the
configs in `experiments/speedrun/`. Both implementations train on windows of 64 tokens, and are evaluated on the whole
validation split (the last tenth of the text) in non-overlapping windows of 64 tokens. The clock measures only
training: it stops during validation, sampling and saving. Times are reported with and without the first step, which
includes compilation. The implementations alternate, each in its own process.
"""

import argparse
import json
import os
import pickle
import platform
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

Curve = list[dict[str, float]]
BOTH = (False, True)
CONFIGS = {1.88: "shakespeare_char_1.88.yaml", 1.67: "shakespeare_char_1.67.yaml"}
README_FLAGS = [
    "--device=cpu", "--compile=False", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4",
    "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
]  # fmt: skip
"""Flags from nanoGPT's README, without the two flags that set the interval and the precision of evaluations."""
EVERY = 250
"""Number of nanoGPT iterations between two evaluations."""


class Clock:
    """Clock that measures the seconds spent on training."""

    def __init__(self) -> None:
        self.seconds, self.first_step = 0.0, 0.0
        self.since: float | None = None

    def go(self) -> None:
        """Start the clock, unless it is running."""
        if self.since is None:
            self.since = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock, if it is running."""
        if self.since is not None:
            self.seconds += time.perf_counter() - self.since
        self.since = None


def report(steps: int, loss: float, clock: Clock) -> None:
    """Print one point of the loss curve, which the parent process reads."""
    point = {"step": steps, "loss": loss, "seconds": clock.seconds, "first_step": clock.first_step}
    print("POINT " + json.dumps(point), flush=True)


def run_nanogpt(checkout: Path, text: Path) -> None:
    """Run nanoGPT's `train.py`; `GPT.train` (which is called around evaluations) and `torch.save` control the clock."""
    import torch

    characters = text.read_text(encoding="utf-8")
    names = sorted(set(characters))
    ids = np.array([names.index(c) for c in characters], dtype=np.uint16)
    border = int(len(ids) * 0.9)
    data = checkout / "data" / "shakespeare_char"
    ids[:border].tofile(data / "train.bin")
    ids[border:].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(names), "itos": names, "stoi": {}}))
    held_out = torch.from_numpy(ids[border:].astype(np.int64))
    n = (len(held_out) - 1) // 64 * 64
    inputs, labels = held_out[:n].view(-1, 64), held_out[1 : n + 1].view(-1, 64)

    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    import model as peer

    clock, train = Clock(), peer.GPT.train

    def train_or_evaluate(self: Any, mode: bool = True) -> Any:
        (clock.go if mode else clock.stop)()
        return train(self, mode)

    def score_instead_of_saving(checkpoint: dict[str, Any], _: Any) -> None:
        clock.stop()
        gpt = peer.GPT(peer.GPTConfig(**checkpoint["model_args"]))
        gpt.load_state_dict(checkpoint["model"])
        with torch.no_grad():
            losses = [gpt(x, y)[1].item() * len(x) for x, y in zip(inputs.split(128), labels.split(128), strict=True)]
        report(checkpoint["iter_num"], sum(losses) / len(inputs), clock)
        clock.go()

    peer.GPT.train, torch.save = train_or_evaluate, score_instead_of_saving
    looking = [f"--eval_interval={EVERY}", "--eval_iters=1", "--always_save_checkpoint=True"]
    sys.argv = ["train.py", "config/train_shakespeare_char.py", *README_FLAGS, *looking]
    runpy.run_path("train.py", run_name="__main__")


def run_ours(config: Path, text: Path, flags: list[str]) -> None:
    """Run `fit` with a config, and with the clock as an additional callback."""
    import lightning as L

    from lit_gpt_scratch.cli.entrypoint import run
    from lit_gpt_scratch.cli.fit import FitCLI

    class Timing(L.Callback):
        def __init__(self) -> None:
            self.clock = Clock()

        def on_train_batch_start(self, *_: Any) -> None:
            self.clock.go()

        def on_train_batch_end(self, *_: Any) -> None:
            if not self.clock.first_step:
                self.clock.stop()
                self.clock.first_step = self.clock.seconds
                self.clock.go()

        def on_validation_start(self, *_: Any) -> None:
            self.clock.stop()

        def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
            report(trainer.global_step, trainer.callback_metrics["val/loss"].item(), self.clock)

    def fit_command() -> None:
        cli = FitCLI(["--config", str(config), "--data.source", str(text), *flags])
        cli.trainer.callbacks.insert(0, Timing())
        cli.fit()

    run(fit_command)


def measure(arguments: list[str]) -> Curve:
    """Run one implementation in its own process and return its loss curve."""
    child = subprocess.Popen(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err = child.communicate()
    points = [json.loads(line.removeprefix("POINT ")) for line in out.splitlines() if line.startswith("POINT ")]
    if child.returncode or not points:
        sys.exit(f"{' '.join(arguments)} failed:\n{err[-3000:]}")
    return points


def until(points: Curve, target: float) -> dict[str, float] | None:
    """Return the first point with a loss at or below the target, or None if the curve does not reach the target."""
    return next((point for point in points if point["loss"] <= target), None)


def main() -> None:
    """Run one implementation, or compare both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    given, flags = parser.parse_known_args()
    text = given.text.resolve()
    if given.ours:
        run_ours(given.ours, text, flags)
    elif given.theirs:
        run_nanogpt(given.theirs, text)
    else:
        compare(given.nanogpt, text, given.repeats)


def compare(nanogpt: Path | None, text: Path, repeats: int) -> None:
    """Alternate between the implementations, each in its own process, and print a table."""
    here = Path(__file__).resolve().parents[1] / "speedrun"
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    theirs: list[Curve] = []
    ours: dict[tuple[float, bool], list[Curve]] = {(target, compiled): [] for target in CONFIGS for compiled in BOTH}
    for turn in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            if nanogpt:
                copy = shutil.copytree(nanogpt, Path(folder, "nanogpt"), ignore=shutil.ignore_patterns(".git"))
                theirs.append(measure(["--theirs", str(copy.resolve()), "--text", str(text)]))
            for target, compiled in ours:
                flags = ["--runs", folder, f"--model.compile={compiled}"]
                config = here / CONFIGS[target]
                ours[target, compiled].append(measure(["--ours", str(config), "--text", str(text), *flags]))
        print(f"\nafter turn {turn + 1} of {repeats}")
        rows(theirs, ours)


def rows(theirs: list[Curve], ours: dict[tuple[float, bool], list[Curve]]) -> None:
    """Print the best and the median time over all turns, and the speed-up.

    If nanoGPT does not reach a loss within its whole run, the speed-up is a lower bound.
    """
    finals = [curve[-1]["loss"] for curve in theirs]
    whole = [curve[-1]["seconds"] for curve in theirs]
    print(f"\n{'seconds of training':46} {'best':>7} {'median':>7}  {'times as fast (best)':>20}")
    own = [(max(finals), "1.88 config", ours[1.88, False], ours[1.88, True])] if finals else []
    for target, name, eager, compiled in [*own, *((t, f"{t} config", ours[t, False], ours[t, True]) for t in CONFIGS)]:
        print(f"validation loss {target:.4g} ({name})")
        reached = [point["seconds"] for curve in theirs if (point := until(curve, target))]
        peer = reached or whole
        if peer:
            missed = "" if reached else f"  not reached; its whole run, to {min(finals):.3f}"
            print(f"  {'nanoGPT':44} {min(peer):7.2f} {statistics.median(peer):7.2f}{missed}")
        for label, runs, counted in (
            ("not compiled", eager, True),
            ("compiled, compilation counted", compiled, True),
            ("compiled, first step not counted", compiled, False),
        ):
            points = [point for curve in runs if (point := until(curve, target))]
            mine = [point["seconds"] - (0.0 if counted else point["first_step"]) for point in points]
            if not mine:
                print(f"  {'lit_gpt_scratch, ' + label:44} not reached")
                continue
            ratio = f"{'' if reached else '> '}{min(peer) / min(mine):.1f}" if peer else ""
            steps = sorted({int(point["step"]) for point in points})
            figures = f"{min(mine):7.2f} {statistics.median(mine):7.2f}  {ratio:>20}"
            print(f"  {'lit_gpt_scratch, ' + label:44} {figures}  after {steps} steps", flush=True)


if __name__ == "__main__":
    main()
