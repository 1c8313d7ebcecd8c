"""Draw the README's picture of a run: bits per byte over the steps, against the baselines.

    python -m lit_gpt_scratch.fit --trainer.val_check_interval 50 --experiment picture
    python notebooks/first_run.py runs/picture/version_0

The validations between do not change the weights: the last point is that of a run without flags.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

INK, QUIET, ACCENT = "#1b1f24", "#8c959f", "#7c3aed"


def main(run: Path, picture: Path) -> None:
    """Read a run's TensorBoard events, write a PNG."""
    events = EventAccumulator(str(run)).Reload()
    curve = [(event.step + 1, event.value) for event in events.Scalars("val/bits_per_byte")]
    steps, bits = zip(*curve, strict=True)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("baselines/")]
    figure, axes = plt.subplots(figsize=(9, 4), dpi=120)
    for tag in tags:
        value = events.Scalars(tag)[-1].value
        axes.axhline(value, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
        name = {"xz": "xz -9", "bigram": "bigram of tokens", "unigram": "unigram of tokens"}.get(tag[10:], tag[10:])
        axes.text(steps[-1] * 1.01, value, f"{name} {value:.2f}", color=QUIET, va="center", fontsize=9)
    axes.plot(steps, bits, color=ACCENT, linewidth=2.2, marker="o", markersize=3.5)
    axes.text(steps[-1] * 1.01, bits[-1], f"this model {bits[-1]:.2f}", color=ACCENT, va="center", fontweight="bold")
    axes.set(xlim=(0, steps[-1]), ylim=(1.2, 4), xlabel="optimizer steps", ylabel="bits per byte of files never seen")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("A GPT learns Python in two minutes on two CPU cores", loc="left", color=INK, fontsize=12)
    figure.tight_layout()
    figure.savefig(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).with_suffix(".png"))
