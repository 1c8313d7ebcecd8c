"""Coordinate check: whether activations have the same scale at each width after a few steps of training.

In the maximal update parametrization they do; otherwise, the learning rate that is best for a narrow model is not best
for a wide one (https://arxiv.org/abs/2203.03466, section D.1). The check trains models of several widths on one batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from statistics import mean
from typing import Any, Final

import torch
from torch import Tensor, nn

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import token_cross_entropy
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.optim.lr_schedule import Schedule
from lit_gpt_scratch.optim.optimizers import OptimizerRecipe

WIDTHS: Final = (64, 128, 256, 512, 1024)
SEEDS: Final = range(8)
FLAT_RATIO: Final = 1.1
"""Maximum ratio between the largest and the smallest scale of an activation over the widths for which it is flat."""
VOCAB_SIZE, BATCH, BLOCK_SIZE = 256, 1, 32
"""Sizes of the batch, which has fewer tokens than the narrowest model has channels.

Otherwise, the number of tokens would limit the rank of Muon's updates at large widths and the width at small ones, so
that the share of the activations that an update can change would depend on the width. The random overlaps between the
embeddings of different tokens, which decrease with the width, matter less with fewer tokens, too.
"""


@dataclass(frozen=True)
class CoordinateCheck:
    """Scales of activations at several widths.

    Attributes:
        config: Architecture, apart from the width.
        optimizer: Name of the optimizer.
        widths: Values of ``n_embd``, in ascending order.
        steps: Number of optimizer steps before the scales were measured.
        scales: Root mean square of each activation, averaged over seeds, with one value per width; keyed by the name of
            the activation, such as ``blocks.0.attention``.
    """

    config: GPTConfig
    optimizer: str
    widths: tuple[int, ...]
    steps: int
    scales: dict[str, list[float]]

    @property
    def ratios(self) -> dict[str, float]:
        """Ratio of the largest to the smallest scale of each activation; infinite if one is 0 or not finite."""
        return {
            name: max(scales) / min(scales) if all(map(isfinite, scales)) and min(scales) else inf
            for name, scales in self.scales.items()
        }

    @property
    def not_flat(self) -> list[str]:
        """Names of the activations whose scale depends on the width by more than ``FLAT_RATIO``."""
        return [name for name, ratio in self.ratios.items() if ratio > FLAT_RATIO]

    @property
    def verdict(self) -> str:
        """Whether hyperparameters can be transferred across the widths, and if not, what to do, in one line."""
        across = f"from width {self.widths[0]} to {self.widths[-1]} with {self.optimizer}"
        if not self.not_flat:
            return f"flat: no activation changes its scale by more than {FLAT_RATIO - 1:.0%} {across}"
        name = max(self.not_flat, key=lambda name: self.ratios[name])
        advice = "check that custom modules declare their optimizer_group, or lower the learning rate"
        if self.config.parametrisation == "standard":
            advice = f"set --model.gpt.parametrisation mup --model.gpt.mup_base_width {self.config.n_embd}"
        elif self.not_flat == ["logits"] and self.scales["logits"][0] > self.scales["logits"][-1]:
            # An initial head that is not zero multiplies hidden states that it is not yet aligned with.
            advice = "compare wider models, because the share of the random initial head decreases with their width"
        return (
            f"not flat: {len(self.not_flat)} of {len(self.scales)} activations change their scale {across}, most of "
            f"all {name} by a factor of {self.ratios[name]:.3g}, so the best learning rate depends on the width; "
            f"{advice}"
        )

    def __str__(self) -> str:
        header = [
            "activation",
            *(f"width {width}" for width in self.widths),
            "max / min",
            f"within {FLAT_RATIO - 1:.0%}",
        ]
        rows = [
            [
                name,
                *(f"{scale:.4g}" for scale in scales),
                f"{self.ratios[name]:.3f}",
                "no" if name in self.not_flat else "yes",
            ]
            for name, scales in self.scales.items()
        ]
        sizes = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        table = [header, ["-" * size for size in sizes], *rows]
        return "\n".join(
            f"| {' | '.join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True))} |" for row in table
        )

    def save_plot(self, path: Path) -> None:
        """Save a plot of the scales over the width, in the format of the file extension; requires matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.0, 5.0), layout="constrained")
        axes = figure.add_subplot()
        for name, scales in self.scales.items():
            axes.plot(self.widths, scales, marker="o", linestyle="--" if name in self.not_flat else "-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(self.widths, [str(width) for width in self.widths])
        axes.set_xlabel("width n_embd (channels)")
        axes.set_ylabel(f"root mean square after {self.steps} steps")
        base = f", base width {self.config.mup_base_width}" if self.config.mup_base_width else ""
        axes.set_title(f"Coordinate check: {self.config.parametrisation}{base}, {self.optimizer}")
        figure.legend(loc="outside right upper", frameon=False, fontsize="small", title="dashed: not flat")
        figure.savefig(path, dpi=120)


def check_coordinates(
    config: GPTConfig,
    recipe: OptimizerRecipe,
    widths: Sequence[int] = WIDTHS,
    steps: int = 10,
    seeds: Sequence[int] = SEEDS,
    on_run: Callable[[], object] = lambda: None,
) -> CoordinateCheck:
    """Train a model at several widths on random tokens, and measure the scale of its activations.

    The learning rate warms up as by default in ``fit``, and gradients are clipped to norm 1.

    Args:
        config: Architecture, of which ``GPTConfig.at_width`` derives the other widths.
        recipe: Optimizer with the hyperparameters for all widths.
        widths: Values of ``n_embd``.
        steps: Number of optimizer steps.
        seeds: Random seeds of the initial weights and of the tokens.
        on_run: Callback that is called after each of the ``len(widths) * len(seeds)`` runs.

    Raises:
        UserError: There are fewer than two widths, or the config does not support one of them.
    """
    widths = sorted(set(widths))
    if len(widths) < 2:
        raise UserError(f"a coordinate check requires at least two widths, but there is only {widths}; add another one")
    configs = [config.at_width(width) for width in widths]
    runs: list[list[dict[str, float]]] = []
    for own in configs:
        runs.append([])
        for seed in seeds:
            runs[-1].append(_train(own, recipe, steps, seed))
            on_run()
    scales = {name: [mean(run[name] for run in at_width) for at_width in runs] for name in runs[0][0]}
    return CoordinateCheck(config, type(recipe).__name__, tuple(widths), steps, scales)


def _train(config: GPTConfig, recipe: OptimizerRecipe, steps: int, seed: int) -> dict[str, float]:
    """Return the root mean square of each activation after training."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, VOCAB_SIZE + 1).expand(BATCH, -1)  # Zipf's law, as in text
    ids = torch.multinomial(frequencies, BLOCK_SIZE + 1, replacement=True, generator=generator)  # (B, T + 1)
    inputs, labels = ids[:, :-1], ids[:, 1:].contiguous()
    net, schedule = GPT(config, VOCAB_SIZE, BLOCK_SIZE, seed=seed), Schedule(decay="constant")
    optimizer = recipe.build(net)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule.factor(step, steps)
        nats, count = token_cross_entropy(net(inputs), labels)
        (nats / count).backward()  # type: ignore[no-untyped-call]  # not annotated in torch
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return _measure(net, inputs)


@torch.no_grad()
def _measure(net: GPT, input_ids: Tensor) -> dict[str, float]:
    """Return the root mean square of the embeddings, the outputs of blocks and their branches, and the logits."""
    scales: dict[str, float] = {}

    def record(name: str) -> Callable[[nn.Module, object, Any], None]:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            activation: Tensor = output[0] if isinstance(output, tuple) else output  # the other outputs are of a router
            scales[name] = activation.square().mean().sqrt().item()

        return hook

    named: dict[str, nn.Module] = {"embedding": net.embedding}
    for layer, block in enumerate(net.blocks):
        branches = {part: block.get_submodule(part) for part in ("attention", "feed_forward")}
        named |= {f"blocks.{layer}.{part}": module for part, module in branches.items()} | {f"blocks.{layer}": block}
    handles = [module.register_forward_hook(record(name)) for name, module in named.items()]
    logits = net.eval()(input_ids)
    for handle in handles:
        handle.remove()
    return {**scales, "logits": logits.square().mean().sqrt().item()}
