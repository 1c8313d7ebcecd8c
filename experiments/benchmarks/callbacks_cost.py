"""Measure the cost of all callbacks in a default run of `fit`, by alternating steps with and without callbacks.

    python experiments/benchmarks/callbacks_cost.py

Half of the steps in the run are executed without callbacks, so that other load on the machine affects both halves
equally. There are four types of steps: ordinary steps, logging steps, steps after which the network is inspected, and
steps followed by a validation. Half of the steps of each type have callbacks. Logging, inspection and validation are
more frequent in the benchmark than in a default run, to collect enough samples. The differences between neighboring
steps with and without callbacks are then weighted by the frequency of each type in a default run. The time that
callbacks take before the first step, in the first three steps and after the last step is measured directly. All
caches are empty at the start, so that imports, text preparation, tokenizer training and compilation take as long as
in a first run.
"""

import argparse
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from lit_gpt_scratch.callbacks.metric_logging import MetricTap
from lit_gpt_scratch.cli.fit import MAX_STEPS, FitCLI

LOG, LOOK, VALIDATE = 5, 10, 60
"""Steps between two logging, inspection or validation steps; each type includes the work of more frequent types."""
KINDS = {"ordinary": None, "log point": 10, "inspection": 100, "validation": 300}
"""Steps between two steps of each type in a default run; None for all other steps."""
WARM = 3
HOOKS_OF_A_BATCH = (
    "on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_before_zero_grad", "on_train_batch_end", "on_validation_batch_start", "on_validation_batch_end",
)  # fmt: skip
RESAMPLED = 2000


class Switch(L.Callback):
    """Callback that removes all other callbacks from half of the steps of each type, and measures every step."""

    def __init__(self, others: list[L.Callback]) -> None:
        self.others = others
        self.seconds: dict[tuple[str, bool], list[float]] = defaultdict(list)
        self._turn: Counter[str] = Counter()
        self._now: tuple[str, bool] | None = None
        self._began = 0.0
        self._judge: Any = None
        self._loggers: list[Any] = []
        self.first_steps = ExitStack()
        """Stack to close after the first ``WARM`` steps, which ends the timing of their hooks."""
        self.ready = 0.0
        """Time at which compilation has finished and the measured steps start, in seconds of ``time.perf_counter``."""

    def _set(self, trainer: L.Trainer, task: L.LightningModule, with_them: bool) -> None:
        """Enable or disable the other callbacks, including the guard's step filter and the doctor's logger."""
        # Modify the list in place: the trainer is iterating over it, and this is its first callback.
        trainer.callbacks[:] = [self, *self.others] if with_them else [self]
        task.step_filter = self._judge if with_them else None
        trainer.loggers = self._loggers if with_them else [x for x in self._loggers if not isinstance(x, MetricTap)]

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        """Record the previous step, which includes a validation that follows it, and start the next step."""
        came = time.perf_counter()
        if not self._loggers:
            self._judge, self._loggers = task.step_filter, list(trainer.loggers)
        if self._now is not None:
            self.seconds[self._now].append(came - self._began)
        step = trainer.global_step + 1
        kind = next(k for k, every in (("validation", VALIDATE), ("inspection", LOOK), ("log point", LOG),
                                       ("ordinary", 1)) if step % every == 0)  # fmt: skip
        # The order is with, without, without, with, so that half of the steps after each other type have callbacks too.
        with_them = self._turn[kind] % 4 in (0, 3)
        self._turn[kind] += 1
        if step == WARM + 1:
            self.ready = came
            self.first_steps.close()
        self._now = (kind, with_them) if step > WARM else None
        self._set(trainer, task, with_them or step <= WARM)
        self._began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """Restore the callbacks, which report at the end of training; the last step is not recorded."""
        self._set(trainer, task, True)


def timed(callbacks: list[L.Callback], spent: Counter[str], hooks: tuple[str, ...]) -> ExitStack:
    """Add the seconds spent in the given hooks to ``spent``, until the returned stack is closed."""
    before = ExitStack()

    def wrap(name: str, hook: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    for callback in callbacks:
        for hook in hooks:
            if (known := getattr(callback, hook)) is not None:
                setattr(callback, hook, wrap(f"{type(callback).__name__}.{hook}", known))
                before.callback(setattr, callback, hook, known)
    return before


def main() -> None:
    """Run the benchmark and print a table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument(
        "--validations", type=int, default=10, help="number of validations, half of which run with callbacks"
    )
    given = asked.parse_args()
    steps = VALIDATE * given.validations + 1
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import lit_gpt_scratch.cli.fit"], check=True)
    imports = time.perf_counter() - began
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as runs:
        os.environ |= {name: f"{runs}/{name}" for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")}
        launched = time.perf_counter()
        cli = FitCLI(
            [
                f"--runs={runs}", f"--trainer.max_steps={steps}", f"--trainer.log_every_n_steps={LOG}",
                f"--trainer.val_check_interval={VALIDATE}", f"--inspect.every_n_steps={LOOK}",
                "--trainer.accelerator=cpu",
            ]
        )  # fmt: skip
        callbacks = list(cli.trainer.callbacks)
        timed(callbacks, ends, ("setup", "on_fit_start", "on_train_start", "on_train_end"))
        inside: Counter[str] = Counter()
        timed(callbacks, inside, ("on_validation_start", "on_validation_batch_end", "on_validation_end"))
        switch = Switch(callbacks)
        switch.first_steps = timed(callbacks, ends, HOOKS_OF_A_BATCH)
        cli.trainer.callbacks.insert(0, switch)
        cli.fit()
    before = imports + switch.ready - launched
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(f"{platform.machine()}, {threads}, torch {torch.__version__}, wall seconds")
    print(f"{'milliseconds':14} {'with':>9} {'without':>9} {'cost':>8} {'ratio':>7}   (medians; cost from neighbors)")
    whole = cost = 0.0
    doubt = np.zeros(RESAMPLED)
    left, coarser = MAX_STEPS, 0
    for kind, often in reversed(KINDS.items()):
        on, off = switch.seconds[kind, True], switch.seconds[kind, False]
        # Pairs of neighboring steps of one type, with and without callbacks: other load affects both equally.
        pairs = [its - own for its, own in zip(on, off, strict=False)]
        with_them, without, more = (statistics.median(found) for found in (on, off, pairs))
        n = left if often is None else MAX_STEPS // often - coarser
        coarser += n
        left -= n
        cost += n * more
        whole += n * without
        doubt += n * medians(pairs)
        print(
            f"{kind:14} {1000 * with_them:9.1f} {1000 * without:9.1f} {1000 * more:8.2f} "
            f"{1 + more / without:7.3f}   ({len(pairs)} pairs; {n} in a run without flags)"
        )
    print(f"before the steps, in the first {WARM} steps and after the last: {sum(ends.values()):.2f} s: {_most(ends)}")
    half = max(len(switch.seconds["validation", True]), 1)
    print(f"at a validation, in milliseconds: {_most(Counter({k: v * 1000 / half for k, v in inside.items()}))}")
    every = cost + sum(ends.values())
    first = whole + before - sum(ends.values())
    low, high = ((quantile + sum(ends.values())) / first for quantile in np.quantile(doubt, (0.025, 0.975)))
    print(
        f"of {whole:.1f} s of steps and validations: {cost:.2f} s, {cost / whole:.2%}; of {first:.1f} s of a first run "
        f"without callbacks, in total {every:.2f} s, {every / first:.2%} (95% interval {low:.2%} to {high:.2%})"
    )


def medians(seconds: list[float]) -> NDArray[np.float64]:
    """Return the medians of ``RESAMPLED`` bootstrap samples, (RESAMPLED,) float64."""
    drawn = np.random.default_rng(len(seconds)).choice(seconds, (RESAMPLED, len(seconds)))
    return np.asarray(np.median(drawn, axis=1))


def _most(spent: Counter[str]) -> str:
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent.most_common(5))


if __name__ == "__main__":
    main()
