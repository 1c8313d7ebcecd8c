"""Whether all ways to lay a run out over processes and micro-batches compute the same."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError

SAMPLES_PER_STEP: Final = 8
"""Of a step, in every layout."""


class ParallelLayout(NamedTuple):
    """One way to do the same step.

    Attributes:
        processes: How many there are.
        copies: How many of them read data of their own.
        accumulate: Micro-batches of a step.
        flags: What else ``fit`` is told.
    """

    processes: int = 1
    copies: int = 1
    accumulate: int = 1
    flags: tuple[str, ...] = ()

    def all_flags(self) -> list[str]:
        """Of ``fit``."""
        return [
            f"--trainer.devices={self.processes}",
            f"--data.batch_size={SAMPLES_PER_STEP // self.copies // self.accumulate}",
            f"--trainer.accumulate_grad_batches={self.accumulate}",
            *self.flags,
        ]


LAYOUTS: Final[dict[str, ParallelLayout]] = {
    "single": ParallelLayout(),
    "accumulation 2": ParallelLayout(accumulate=2),
    "accumulation 4": ParallelLayout(accumulate=4),
    "manual attention": ParallelLayout(flags=("--model.gpt.attention_backend=manual",)),
    "activation checkpointing": ParallelLayout(flags=("--model.activation_checkpointing=true",)),
    "compiled": ParallelLayout(flags=("--model.compile=true",)),
    "ddp 2": ParallelLayout(2, 2, flags=("--trainer.strategy=ddp",)),
    "fsdp2 2": ParallelLayout(2, 2, flags=("--trainer.strategy=fsdp2",)),
    "tp 2": ParallelLayout(2, 1, flags=("--trainer.strategy=tp",)),
    "fsdp2_tp 4": ParallelLayout(4, 2, flags=("--trainer.strategy=fsdp2_tp",)),
    "fsdp2_tp 4, compiled": ParallelLayout(4, 2, flags=("--trainer.strategy=fsdp2_tp", "--model.compile=true")),
}
"""The first is what the others are compared with."""


class ArithmeticCase(NamedTuple):
    """A kind of arithmetic, and how far layouts may be apart in it: the loss of any step, relatively."""

    flags: tuple[str, ...]
    tolerance: float


ADAMW: Final = ("--model.optimizer=AdamW", "--model.optimizer.lr=1e-3")
ARITHMETIC_CASES: Final[dict[str, ArithmeticCase]] = {
    "float64": ArithmeticCase((*ADAMW, "--trainer.precision=64-true"), 1e-10),
    "float32": ArithmeticCase((*ADAMW, "--trainer.precision=32-true"), 1e-5),
    "muon": ArithmeticCase(("--trainer.precision=32-true",), 1e-3),  # its own arithmetic is bfloat16
    "bf16-mixed": ArithmeticCase((*ADAMW, "--trainer.precision=bf16-mixed"), 1e-2),
}
GRADIENT_TOLERANCES: Final = {"gradient": 1e-6, "worst tensor": 1e-5}
"""How far the gradient of the first step may be off in float32: all of it by its norm, and a number by the largest of
its tensor."""


@dataclass
class LayoutParity:
    """Runs ``fit`` in every layout and kind of arithmetic, and compares.

    Args:
        flags: Of ``fit``, for all.
        folder: Where the runs go.
        kinds: Of arithmetic, by name.
        layouts: By name; the first is always run.
    """

    flags: Sequence[str]
    folder: Path
    kinds: Sequence[str] = tuple(ARITHMETIC_CASES)
    layouts: Sequence[str] = tuple(LAYOUTS)
    loss: dict[tuple[str, str], float] = field(default_factory=dict)
    """By layout and kind, how far the loss is off at most."""
    gradient: dict[tuple[str, str], float] = field(default_factory=dict)
    """By layout and measure, how far the gradient of the first step is off in float32."""
    repeats: dict[str, bool] = field(default_factory=dict)
    """By layout, whether two runs of it in the first kind are alike to the last bit."""

    @property
    def runs(self) -> int:
        """How many there will be: each once in every kind, and once more in the first."""
        return len(self._names) * (len(self.kinds) + 1)

    @property
    def _names(self) -> list[str]:
        first = next(iter(LAYOUTS))
        return [first, *(name for name in self.layouts if name != first)]

    def run(self, tell: Callable[[], object] = lambda: None) -> None:
        """Run all of them.

        Args:
            tell: Called after each.

        Raises:
            UserError: A run fails.
        """
        for kind in self.kinds:
            expected: dict[str, Any] | None = None
            for name in self._names:
                found = self._trace(name, kind, tell)
                expected = expected or found
                self.loss[name, kind] = ((found["losses"] - expected["losses"]).abs() / expected["losses"]).max().item()
                if kind == "float32":
                    off = _gradient_differences(found["gradients"], expected["gradients"])
                    self.gradient |= {(name, measure): value for measure, value in off.items()}
                if kind == self.kinds[0]:
                    self.repeats[name] = _bitwise_equal(found, self._trace(name, kind, tell))

    @property
    def violations(self) -> list[str]:
        """What is further off than its band allows."""
        found = [
            f"{name}, {kind}" for (name, kind), off in self.loss.items() if not off <= ARITHMETIC_CASES[kind].tolerance
        ]
        found += [
            f"{name}, {part}" for (name, part), off in self.gradient.items() if not off <= GRADIENT_TOLERANCES[part]
        ]
        return found + [f"{name}, repeated" for name, same in self.repeats.items() if not same]

    def __str__(self) -> str:
        bands = {kind: ARITHMETIC_CASES[kind].tolerance for kind in self.kinds} | (
            GRADIENT_TOLERANCES if self.gradient else {}
        )
        rows = [["layout", *bands, "twice"], ["allowed", *(f"{band:.0e}" for band in bands.values()), "same bits"]]
        found = self.loss | self.gradient
        for name, same in self.repeats.items():
            offs = [found[name, column] for column in bands]
            rows.append([name, *(f"{off:.1e}" if off else "0" for off in offs), "yes" if same else "no"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, " | ".join("-" * width for width in widths))
        return "\n".join(f"| {line} |" for line in lines)

    def _trace(self, layout: str, kind: str, tell: Callable[[], object]) -> dict[str, Any]:
        runs = self.folder / f"{len(list(self.folder.iterdir()))}"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "lit_gpt_scratch.fit", *self.flags),
                *(f"--runs={runs}", "--experiment=parity", "--trainer.log_every_n_steps=1"),
                "--trainer.callbacks=lit_gpt_scratch.callbacks.summary.LossTrace",
                *ARITHMETIC_CASES[kind].flags,
                *LAYOUTS[layout].all_flags(),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["nothing"]
            raise UserError(f"{layout}, {kind}: fit ended with exit code {done.returncode}; it said: {lines[-1]}")
        traced: dict[str, Any] = torch.load(runs / "parity" / "version_0" / "trace.pt", weights_only=True)
        tell()
        return traced


def _gradient_differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """How far one gradient is from another; NaN where any number is."""
    smallest = 1e-30  # of a gradient that is zero
    worst = [(found[name] - g).abs().max() / g.abs().max().clamp(min=smallest) for name, g in expected.items()]
    difference = torch.cat([(found[name] - g).flatten() for name, g in expected.items()])
    whole = difference.norm() / torch.cat([g.flatten() for g in expected.values()]).norm()
    return dict(zip(GRADIENT_TOLERANCES, (whole.item(), torch.stack(worst).max().item()), strict=True))


def _bitwise_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(torch.equal(gradient, other["gradients"][name]) for name, gradient in one["gradients"].items())
    return same and torch.equal(one["losses"], other["losses"])
