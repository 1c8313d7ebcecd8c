"""Measure how the best learning rate depends on the width, in the standard parametrization and with mup.

    python experiments/scaling/learning_rate_transfer.py [--optimizer AdamW] [--seeds 8] [--steps 100] [--workers 2]

Models of two layers and several widths are trained on the bytes of Python's standard library, with the default schedule
and gradient clipping of `fit`. Learning rates are on a grid of factors of 1.5 around the default; Muon's two rates are
multiplied by the same factor. At each width, the search starts at the best rate of the width before, and tries lower
and higher rates until two are worse on either side. The measure is the loss on held-out files, averaged over seeds. All
seeds, widths and rates see the same validation windows, and all widths and rates with the same seed the same batches.
Because the losses are noisy, the vertex of a parabola through the five losses around the lowest one is reported, too,
with a bootstrap interval. README.md in this folder states the reasons for the setup.

Writes `learning_rate_transfer_<optimizer>.txt` and `.png` next to this file.
"""

import argparse
import multiprocessing
import sysconfig
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.optim import AdamW, Muon
from lit_gpt_scratch.optim.lr_schedule import Schedule
from lit_gpt_scratch.optim.optimizers import OptimizerRecipe

WIDTHS, BASE_WIDTH, STEP = (16, 32, 64, 128, 256), 64, 1.5
SHAPE = GPTConfig(n_layer=2, n_head=8, n_embd=BASE_WIDTH, initialisation="gpt2")
PARAMETRISATIONS = {
    "standard": SHAPE,
    "mup": replace(SHAPE, parametrisation="mup", mup_base_width=BASE_WIDTH),
}
RECIPES: dict[str, Callable[[float], OptimizerRecipe]] = {
    "AdamW": lambda factor: AdamW(lr=3e-3 * factor),
    "Muon": lambda factor: Muon(lr=0.02 * factor, adamw_lr=8e-3 * factor),
}
VOCAB_SIZE, BATCH, BLOCK_SIZE, VALIDATION_WINDOWS = 256, 32, 16, 1024
RESAMPLES = 2000
"""Number of bootstrap samples."""
Losses = dict[int, list[float]]
"""Validation loss in nats per byte for each seed, keyed by the position of the learning rate on the grid."""


def read_bytes() -> tuple[Tensor, Tensor]:
    """Return the bytes of the training files and of every tenth file, int64 tensors."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [torch.frombuffer(bytearray(path.read_bytes() or b" "), dtype=torch.uint8) for path in files]
    held_out = parts[::10]
    return torch.cat([part for i, part in enumerate(parts) if i % 10]).long(), torch.cat(held_out).long()


def windows(data: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of random windows, both (n, BLOCK_SIZE)."""
    starts = torch.randint(len(data) - BLOCK_SIZE, (n, 1), generator=generator)
    rows = data[starts + torch.arange(BLOCK_SIZE + 1)]  # (n, BLOCK_SIZE + 1)
    return rows[:, :-1], rows[:, 1:].contiguous()


def train(config: GPTConfig, recipe: OptimizerRecipe, data: tuple[Tensor, Tensor], steps: int, seed: int) -> float:
    """Train a model and return its validation loss in nats per byte."""
    net, schedule = GPT(config, VOCAB_SIZE, BLOCK_SIZE, seed=seed), Schedule()
    optimizer, generator = recipe.build(net), torch.Generator().manual_seed(seed)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule.factor(step, steps)
        inputs, labels = windows(data[0], BATCH, generator)
        nats, count = token_cross_entropy(net(inputs), labels)
        (nats / count).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    inputs, labels = windows(data[1], VALIDATION_WINDOWS, torch.Generator().manual_seed(0))
    with torch.no_grad():
        nats, count = token_cross_entropy(net(inputs), labels)
    return (nats / count).item()


def best(losses: Losses) -> int:
    """Return the position of the learning rate with the lowest mean loss; a loss of NaN counts as infinite."""
    return min(losses, key=lambda k: mean(loss if loss == loss else float("inf") for loss in losses[k]))


def search(measure: Callable[[int], list[float]], start: int) -> Losses:
    """Measure positions on the grid until the best one has two worse neighbors on either side."""
    losses: Losses = {}
    center = start
    while missing := [k for k in range(center - 2, center + 3) if k not in losses]:
        losses |= {k: measure(k) for k in missing}
        center = best(losses)
    return dict(sorted(losses.items()))


def draw(results: dict[str, dict[int, Losses]], optimizer: str, path: Path) -> None:
    """Draw the mean loss over the learning rate, one panel per parametrization and one line per width."""
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    panels = figure.subplots(1, len(results), sharex=True, sharey=True)
    for axes, (name, by_width) in zip(panels, results.items(), strict=True):
        for i, (width, losses) in enumerate(by_width.items()):
            rates, color = [rate(optimizer, k) for k in losses], f"C{i}"
            axes.plot(rates, [mean(values) for values in losses.values()], "-", color=color, label=f"{width} channels")
            for k, values in losses.items():
                axes.plot([rate(optimizer, k)] * len(values), values, ".", color=color, markersize=4)
            axes.plot(rate(optimizer, best(losses)), mean(losses[best(losses)]), "o", color=color, markersize=9)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("learning rate (peak)")
        axes.set_title(f"{name}, {optimizer}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss (nats per byte)")
    figure.axes[-1].legend(title="large dot: best rate\nsmall dots: seeds", fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


def vertices(losses: Losses) -> NDArray[np.float64]:
    """Fit a parabola to the five losses around the lowest one, and return positions of its vertex, bootstrapped.

    Residuals of all five positions and all seeds, without the seeds' mean differences, are resampled with replacement.
    Positions outside the fitted ones count as the outermost one.

    Returns:
        Positions on the grid, of shape (1 + RESAMPLES,), of which the first is that of the fit to all losses.
    """
    center, generator = best(losses), np.random.default_rng(0)
    offsets, fine = np.arange(-2, 3), np.linspace(-2, 2, 401)
    values = np.array([losses[center + offset] for offset in offsets])  # (5, seeds)
    values -= values.mean(0)
    solve = np.linalg.pinv(np.vander(offsets, 3))  # (3, 5), from losses to the coefficients of the parabola
    curve = np.vander(offsets, 3) @ solve @ values.mean(1)  # (5,)
    residuals = values - curve[:, None]
    degrees_of_freedom = values.size - 2 - values.shape[1]  # slope, curvature, and an offset per seed
    residuals *= np.sqrt(values.size / degrees_of_freedom)
    resampled = curve + generator.choice(residuals.ravel(), (RESAMPLES, *values.shape)).mean(2)  # (RESAMPLES, 5)
    means = np.concatenate([values.mean(1)[None], resampled])  # (1 + RESAMPLES, 5)
    lowest = (means @ solve.T @ np.vander(fine, 3).T).argmin(1)
    return np.asarray(center + fine[lowest])


def interval(samples: NDArray[np.float64]) -> str:
    """Return the first sample and, in parentheses, the interval between the 5th and the 95th percentile of the others.

    In simulations with two seeds, the interval of a vertex contained the true position in 86% of the cases.
    """
    low, high = np.percentile(samples[1:], [5, 95])
    return f"{samples[0]:.1f} ({low:.1f} to {high:.1f})"


def search_widths(name: str, optimizer: str, n_seeds: int, steps: int) -> dict[int, Losses]:
    """Search for the best learning rate at each width, with one thread; return the losses keyed by width."""
    torch.set_num_threads(1)
    data, found, start = read_bytes(), dict[int, Losses](), 0
    for width in WIDTHS:
        run = partial(train, PARAMETRISATIONS[name].at_width(width), data=data, steps=steps)

        def measure(k: int, run: Callable[..., float] = run) -> list[float]:
            return [run(RECIPES[optimizer](STEP**k), seed=seed) for seed in range(n_seeds)]

        found[width] = search(measure, start)
        start = best(found[width])
        print(describe(name, optimizer, width, found[width]), flush=True)
    return found


def rate(optimizer: str, k: float) -> float:
    """Return the learning rate at a position on the grid."""
    return float(vars(RECIPES[optimizer](STEP**k))["lr"])


def describe(name: str, optimizer: str, width: int, losses: Losses) -> str:
    """Return a line of the table."""
    k = best(losses)
    by_seed = ", ".join(f"{best({i: [v[seed]] for i, v in losses.items()}):+d}" for seed in range(len(losses[k])))
    curve = ", ".join(f"{i:+d}: {mean(values):.3f}" for i, values in losses.items())
    return (
        f"{name:8}  width {width:3}  best rate {rate(optimizer, k):.1e} at {k:+d} (by seed {by_seed}; "
        f"parabola {interval(vertices(losses))})  loss {mean(losses[k]):.3f}  [{curve}]"
    )


def main() -> None:
    """Run the search for both parametrizations, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=RECIPES, default="AdamW")
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds per width and rate")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps per run")
    parser.add_argument("--workers", type=int, default=1, help="2 searches both parametrizations at the same time")
    given = parser.parse_args()
    arguments = given.optimizer, given.seeds, given.steps
    with ProcessPoolExecutor(given.workers, multiprocessing.get_context("spawn")) as pool:
        running = {name: pool.submit(search_widths, name, *arguments) for name in PARAMETRISATIONS}
        results = {name: future.result() for name, future in running.items()}
    lines = [
        f"python experiments/scaling/{Path(__file__).name} --optimizer {given.optimizer} --seeds {given.seeds} "
        f"--steps {given.steps}",
        f"Two cores of an Intel Xeon (Sapphire Rapids), one thread per search; torch {torch.__version__}.",
        f"{BATCH} windows of {BLOCK_SIZE} bytes per step; initialisation {SHAPE.initialisation}.",
        f"Positions on the grid are powers of {STEP}; 0 is the default rate of {rate(given.optimizer, 0):g}. Losses "
        "are in nats per byte.",
        "After the vertex of each parabola: 90% bootstrap interval.",
        "",
    ]
    for name, by_width in results.items():
        lines += [describe(name, given.optimizer, width, losses) for width, losses in by_width.items()]
        lowest = np.ptp([best(losses) for losses in by_width.values()])
        vertex = np.ptp([vertices(losses) for losses in by_width.values()], axis=0)
        lines += [
            f"{name}: the rate with the lowest loss moves by {lowest} grid steps over all widths",
            f"{name}: the vertex of the parabola moves by {interval(vertex)} grid steps over all widths",
        ]
    target = Path(__file__).with_name(f"{Path(__file__).stem}_{given.optimizer.lower()}")
    target.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(results, given.optimizer, target.with_suffix(".png"))


if __name__ == "__main__":
    main()
