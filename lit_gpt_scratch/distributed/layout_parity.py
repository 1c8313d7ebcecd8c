"""Check that the losses do not depend on the strategy, the number of processes or the micro-batch size."""

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
"""Samples per optimizer step, the same in every layout."""


class ParallelLayout(NamedTuple):
    """A way to split an optimizer step across processes and micro-batches.

    Attributes:
        processes: Number of processes.
        copies: Number of data-parallel replicas.
        accumulate: Micro-batches per step.
        flags: Additional flags for ``fit``.
    """

    processes: int = 1
    copies: int = 1
    accumulate: int = 1
    flags: tuple[str, ...] = ()

    def all_flags(self) -> list[str]:
        """Return all ``fit`` flags for this layout."""
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
    "checkpointing, attention kept": ParallelLayout(flags=("--model.activation_checkpointing=keep_attention",)),
    "checkpointing, matmuls kept": ParallelLayout(flags=("--model.activation_checkpointing=keep_matmuls",)),
    "loss in chunks": ParallelLayout(flags=("--model.max_logits_mb=0.1",)),
    "compiled": ParallelLayout(flags=("--model.compile=true",)),
    "ddp 2": ParallelLayout(2, 2, flags=("--trainer.strategy=ddp",)),
    "fsdp2 2": ParallelLayout(2, 2, flags=("--trainer.strategy=fsdp2",)),
    "tp 2": ParallelLayout(2, 1, flags=("--trainer.strategy=tp",)),
    "fsdp2 2, loss in chunks": ParallelLayout(2, 2, flags=("--trainer.strategy=fsdp2", "--model.max_logits_mb=0.1")),
    "hsdp 4": ParallelLayout(4, 4, flags=("--trainer.strategy=hsdp", "--hsdp_groups=2")),
    "fsdp2_tp 4": ParallelLayout(4, 2, flags=("--trainer.strategy=fsdp2_tp",)),
    "fsdp2_tp 4, compiled": ParallelLayout(4, 2, flags=("--trainer.strategy=fsdp2_tp", "--model.compile=true")),
    "fsdp2 2, matmuls kept": ParallelLayout(
        2, 2, flags=("--trainer.strategy=fsdp2", "--model.activation_checkpointing=keep_matmuls")
    ),
}
"""Layouts by name; the first layout is the reference for the others."""


class ArithmeticCase(NamedTuple):
    """Combination of precision and optimizer with which the layouts are compared.

    Attributes:
        flags: Flags for ``fit``.
        tolerance: Maximum relative difference between layouts in the loss of any step.
    """

    flags: tuple[str, ...]
    tolerance: float


ADAMW: Final = ("--model.optimizer=AdamW", "--model.optimizer.lr=1e-3")
ARITHMETIC_CASES: Final[dict[str, ArithmeticCase]] = {
    "float64": ArithmeticCase((*ADAMW, "--trainer.precision=64-true"), 1e-10),
    "float32": ArithmeticCase((*ADAMW, "--trainer.precision=32-true"), 1e-5),
    "muon": ArithmeticCase(("--trainer.precision=32-true",), 1e-3),  # Newton-Schulz iterations run in bfloat16
    "bf16-mixed": ArithmeticCase((*ADAMW, "--trainer.precision=bf16-mixed"), 1e-2),
}
GRADIENT_TOLERANCES: Final = {"gradient": 1e-6, "worst tensor": 1e-5}
"""Maximum relative differences between the gradients of a layout and the reference gradients in the first step of the
float32 runs.

``gradient`` is the norm of the difference relative to the norm of the whole gradient. ``worst tensor`` is the largest
absolute difference of any element relative to the largest absolute element of its tensor.
"""


@dataclass
class LayoutParity:
    """Test that runs ``fit`` in every parallel layout, and compares losses and gradients between layouts.

    A layout is a number of devices with a strategy; each layout is run once for each combination of precision and
    optimizer (a case).

    Args:
        flags: ``fit`` flags for all runs.
        folder: Folder for the runs.
        cases: Names of the ``ARITHMETIC_CASES`` to run.
        layouts: Names of the layouts to run; the first of ``LAYOUTS`` is always included.
    """

    flags: Sequence[str]
    folder: Path
    cases: Sequence[str] = tuple(ARITHMETIC_CASES)
    layouts: Sequence[str] = tuple(LAYOUTS)
    loss: dict[tuple[str, str], float] = field(default_factory=dict)
    """Maximum relative difference from the loss of the reference layout, keyed by layout and case."""
    gradient: dict[tuple[str, str], float] = field(default_factory=dict)
    """Relative difference from the reference layout's gradient (first step, float32), keyed by layout and measure."""
    reproducible: dict[str, bool] = field(default_factory=dict)
    """Whether two runs of the first case in the same layout are bitwise equal, keyed by layout."""

    @property
    def runs(self) -> int:
        """Number of runs: one per layout and case, and a second one per layout for the first case."""
        return len(self._names) * (len(self.cases) + 1)

    @property
    def _names(self) -> list[str]:
        first = next(iter(LAYOUTS))
        return [first, *(name for name in self.layouts if name != first)]

    def run(self, on_run: Callable[[], object] = lambda: None) -> None:
        """Run every case in every layout.

        Args:
            on_run: Callback that is called after each run.

        Raises:
            UserError: A run fails.
        """
        for case in self.cases:
            expected: dict[str, Any] | None = None
            for name in self._names:
                found = self._trace(name, case, on_run)
                expected = expected or found
                self.loss[name, case] = ((found["losses"] - expected["losses"]).abs() / expected["losses"]).max().item()
                if case == "float32":
                    differences = _gradient_differences(found["gradients"], expected["gradients"])
                    self.gradient |= {(name, measure): value for measure, value in differences.items()}
                if case == self.cases[0]:
                    self.reproducible[name] = _bitwise_equal(found, self._trace(name, case, on_run))

    @property
    def violations(self) -> list[str]:
        """Descriptions of the differences that exceed their tolerance, and of the layouts that are not reproducible."""
        found = [
            f"{name}, {case}"
            for (name, case), difference in self.loss.items()
            if not difference <= ARITHMETIC_CASES[case].tolerance
        ]
        found += [
            f"{name}, {part}"
            for (name, part), difference in self.gradient.items()
            if not difference <= GRADIENT_TOLERANCES[part]
        ]
        return found + [f"{name}, repeated" for name, same in self.reproducible.items() if not same]

    def __str__(self) -> str:
        tolerances = {case: ARITHMETIC_CASES[case].tolerance for case in self.cases} | (
            GRADIENT_TOLERANCES if self.gradient else {}
        )
        rows = [
            ["layout", *tolerances, "repeated run"],
            ["tolerance", *(f"{t:.0e}" for t in tolerances.values()), "same bits"],
        ]
        differences = self.loss | self.gradient
        for name, same in self.reproducible.items():
            values = [differences[name, column] for column in tolerances]
            rows.append([name, *(f"{value:.1e}" if value else "0" for value in values), "yes" if same else "no"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, " | ".join("-" * width for width in widths))
        return "\n".join(f"| {line} |" for line in lines)

    def _trace(self, layout: str, case: str, on_run: Callable[[], object]) -> dict[str, Any]:
        runs = self.folder / f"{len(list(self.folder.iterdir()))}"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "lit_gpt_scratch.fit", *self.flags),
                *(f"--runs={runs}", "--experiment=parity", "--trainer.log_every_n_steps=1"),
                "--trainer.callbacks=lit_gpt_scratch.callbacks.summary.LossTrace",
                *ARITHMETIC_CASES[case].flags,
                *LAYOUTS[layout].all_flags(),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no output"]
            raise UserError(f"{layout}, {case}: fit failed with exit code {done.returncode}: {lines[-1]}")
        traced: dict[str, Any] = torch.load(runs / "parity" / "version_0" / "trace.pt", weights_only=True)
        on_run()
        return traced


def _gradient_differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Compute relative differences between two gradients, keyed by measure, or NaN if any element is NaN."""
    eps = 1e-30  # avoids division by zero if a gradient is all zeros
    worst = [(found[name] - g).abs().max() / g.abs().max().clamp(min=eps) for name, g in expected.items()]
    difference = torch.cat([(found[name] - g).flatten() for name, g in expected.items()])
    total = difference.norm() / torch.cat([g.flatten() for g in expected.values()]).norm()
    return dict(zip(GRADIENT_TOLERANCES, (total.item(), torch.stack(worst).max().item()), strict=True))


def _bitwise_equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    same = all(torch.equal(gradient, other["gradients"][name]) for name, gradient in one["gradients"].items())
    return same and torch.equal(one["losses"], other["losses"])
