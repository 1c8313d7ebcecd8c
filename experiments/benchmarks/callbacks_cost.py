"""What all callbacks of `fit` cost together, of a run without flags: steps with them and steps without, in turns.

    python experiments/benchmarks/callbacks_cost.py

In one run half of the steps have no callback at all, so that whatever else the machine does falls on both alike. Steps
are of kinds: ordinary ones, log points, those after which the network is looked into, and those that a validation
follows; of each kind half have callbacks. They come more often here than in a run without flags, so that there
are enough of them; the medians of each kind are then added up as often as they come there. What callbacks do before
the first step and behind the last one is timed as it is. Nothing is cached when it begins, so that what a run does
before its steps, text, tokenizer and compiling, takes as long as in a first run; imports are not counted.

Where other programs use the machine, too, `--clock processor` counts this process's processor seconds, all threads
together. Callbacks mostly keep one thread busy and steps all of them: of the time that passes on n threads, their share
is up to n times as much.
"""

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from lit_gpt_scratch.callbacks.listening import Listener
from lit_gpt_scratch.cli.fit import MAX_STEPS, FitCLI

LOG, LOOK, VALIDATE = 4, 8, 24
"""Steps between two of a kind; each kind comes with what the more frequent ones do, as in a run without flags."""
KINDS = {"ordinary": None, "log point": 10, "look inside": 50, "validation": 300}
"""Every how many steps they come in a run without flags."""
WARM = 3
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


def clock() -> float:
    """Seconds, of the clock that was asked for."""
    return CLOCKS[chosen[0]]()


chosen = ["wall"]


class Switch(L.Callback):
    """Takes all other callbacks away from half of the steps of a kind, and the time of each step."""

    def __init__(self, others: list[L.Callback]) -> None:
        self.others = others
        self.seconds: dict[tuple[str, bool], list[float]] = defaultdict(list)
        self._turn: Counter[str] = Counter()
        self._now: tuple[str, bool] | None = None
        self._began = 0.0
        self._judge: Any = None
        self._loggers: list[Any] = []
        self.ready = 0.0
        """When all is compiled, and steps are counted."""

    def _set(self, trainer: L.Trainer, task: L.LightningModule, with_them: bool) -> None:
        """Callbacks, and what they have put elsewhere: the guard judges each step, the doctor hears the loggers."""
        # In place: the trainer is going through the list, and this is its first.
        trainer.callbacks[:] = [self, *self.others] if with_them else [self]
        task.judge = self._judge if with_them else None
        trainer.loggers = self._loggers if with_them else [x for x in self._loggers if not isinstance(x, Listener)]

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        """A step lasts from here to the next time here, a validation behind it included."""
        came = clock()
        if not self._loggers:
            self._judge, self._loggers = task.judge, list(trainer.loggers)
        if self._now is not None:
            self.seconds[self._now].append(came - self._began)
        step = trainer.global_step + 1
        kind = next(k for k, every in (("validation", VALIDATE), ("look inside", LOOK), ("log point", LOG),
                                       ("ordinary", 1)) if step % every == 0)  # fmt: skip
        # With, without, without, with: of the steps of a kind that follow those of another, half have callbacks.
        with_them = self._turn[kind] % 4 in (0, 3)
        self._turn[kind] += 1
        if step == WARM + 1:
            self.ready = came
        self._now = (kind, with_them) if step > WARM else None
        self._set(trainer, task, with_them or step <= WARM)
        self._began = clock()

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        """The last step ends nowhere; those who say something in the end are here."""
        self._set(trainer, task, True)


def timed(callbacks: list[L.Callback], spent: Counter[str], hooks: tuple[str, ...]) -> None:
    """Add up the seconds of these hooks."""

    def wrap(name: str, hook: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            try:
                return hook(*args, **kwargs)
            finally:
                spent[name] += clock() - began

        return call

    for callback in callbacks:
        for hook in hooks:
            setattr(callback, hook, wrap(f"{type(callback).__name__}.{hook}", getattr(callback, hook)))


def main() -> None:
    """Measure, and print a table."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--validations", type=int, default=10, help="half of them have callbacks")
    asked.add_argument("--clock", choices=CLOCKS, default="wall")
    given = asked.parse_args()
    chosen[0], steps = given.clock, VALIDATE * given.validations + 1
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as runs:
        os.environ |= {name: f"{runs}/{name}" for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")}
        launched = clock()
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
        cli.trainer.callbacks.insert(0, switch)
        cli.fit()
    before = switch.ready - launched
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(f"{platform.machine()}, {threads}, torch {torch.__version__}, {given.clock} seconds")
    print(f"{'milliseconds':14} {'with':>9} {'without':>9} {'cost':>8} {'ratio':>7}   (medians of with + without)")
    whole = cost = 0.0
    left, coarser = MAX_STEPS, 0
    for kind, often in reversed(KINDS.items()):
        on, off = switch.seconds[kind, True], switch.seconds[kind, False]
        with_them, without = statistics.median(on), statistics.median(off)
        n = left if often is None else MAX_STEPS // often - coarser
        coarser += n
        left -= n
        cost += n * (with_them - without)
        whole += n * without
        print(
            f"{kind:14} {1000 * with_them:9.1f} {1000 * without:9.1f} {1000 * (with_them - without):8.1f} "
            f"{with_them / without:7.3f}   ({len(on)} + {len(off)}; {n} in a run without flags)"
        )
    print(f"before the first step and behind the last: {sum(ends.values()):.2f} s: {_most(ends)}")
    half = max(len(switch.seconds["validation", True]), 1)
    print(f"at a validation, in milliseconds: {_most(Counter({k: v * 1000 / half for k, v in inside.items()}))}")
    every = cost + sum(ends.values())
    first = whole + before - sum(ends.values())
    print(
        f"of {whole:.1f} s of steps and validations: {cost:.2f} s, {cost / whole:.2%}; of {first:.1f} s of a first run "
        f"without any, all in all {every:.2f} s, {every / first:.2%}"
    )


def _most(spent: Counter[str]) -> str:
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent.most_common(5))


if __name__ == "__main__":
    main()
