"""Plot validation bits per byte of the first run over three seeds, with the model-free baselines.

    for seed in 0 1 2; do
        python -m lit_gpt_scratch.fit --trainer.val_check_interval 50 --seed_everything $seed --experiment seed_$seed
    done
    python notebooks/first_run.py runs/seed_*/version_0

The additional validations do not change the weights: the last point is that of a run without flags.
"""

import argparse
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

METRIC = "val/bits_per_byte"
BASELINES = {
    "baselines/uniform": "uniform over tokens",
    "baselines/unigram": "token unigram",
    "baselines/bigram": "token bigram",
    "baselines/xz": "xz -9",
}
TEXT, BASELINE, MODEL = "#1b1f24", "#6e7781", "#7c3aed"


def read_scalars(run: Path) -> dict[str, dict[int, float]]:
    """The metric and the baselines of a run, by tag and optimizer step."""
    events = EventAccumulator(str(run)).Reload()
    tags = [tag for tag in (METRIC, *BASELINES) if tag in events.Tags()["scalars"]]
    return {tag: {event.step + 1: event.value for event in events.Scalars(tag)} for tag in tags}


def plot(runs: list[Path], output: Path) -> None:
    """Draw the mean and the range over the runs, and a line per baseline, as PNG."""
    scalars = [read_scalars(run) for run in runs]
    steps = sorted(set.intersection(*(set(each[METRIC]) for each in scalars)))
    curves = [[each[METRIC][step] for each in scalars] for step in steps]
    mean = [fmean(values) for values in curves]
    low, high = [min(values) for values in curves], [max(values) for values in curves]

    figure = Figure(figsize=(9, 4.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for tag, name in BASELINES.items():
        if tag in scalars[0]:
            value = fmean([list(each[tag].values())[-1] for each in scalars])
            axes.axhline(value, color=BASELINE, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"{name} {value:.2f}", (steps[-1], value), xytext=(6, 0), textcoords="offset points", color=BASELINE,
                va="center", fontsize=9, annotation_clip=False,
            )  # fmt: skip
    axes.plot([], [], color=BASELINE, linewidth=1, linestyle=(0, (4, 3)), label="baselines without a model")
    axes.fill_between(steps, low, high, color=MODEL, alpha=0.2, linewidth=0, label=f"range over {len(runs)} seeds")
    axes.plot(steps, mean, color=MODEL, linewidth=2, marker="o", markersize=3.5, label=f"mean over {len(runs)} seeds")
    axes.annotate(
        f"GPT {mean[-1]:.2f}\n({low[-1]:.2f} to {high[-1]:.2f})", (steps[-1], mean[-1]), xytext=(6, 0),
        textcoords="offset points", color=MODEL, va="center", fontweight="bold", fontsize=9, annotation_clip=False,
    )  # fmt: skip
    axes.set_xlim(0, steps[-1])
    axes.set_ylim(bottom=min(low) - 0.15)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("validation bits per byte (lower is better)")
    axes.set_title("First run: a 2.2M-parameter GPT on Python's standard library", loc="left", color=TEXT, fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center right", frameon=False, fontsize=9, bbox_to_anchor=(1.0, 0.58))
    figure.savefig(output, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders, one per seed")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the PNG to write")
    arguments = parser.parse_args()
    plot(arguments.runs, arguments.output)
