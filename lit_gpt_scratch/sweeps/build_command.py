"""The command of a run: a trial's settings as flags of ``fit``."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.search_space import Flags
from lit_gpt_scratch.sweeps.sweep_config import Assignment, Sweep, digest

FIT = "lit_gpt_scratch.fit"
"""The module that runs are processes of."""


@dataclass(frozen=True)
class ResolvedBaseline:
    """What ``fit`` says of the baseline.

    Args:
        flags: Every flag of it and its value, by short name.
        replicas: Processes that read windows of their own.
    """

    flags: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1


def arguments(sweep: Sweep, assignment: Assignment, known: ResolvedBaseline) -> list[str]:
    """The arguments of ``fit`` that make a trial, without seed and folder.

    Raises:
        UserError: A budget of tokens cannot be made into steps.
    """
    flags = sweep.flags(assignment)
    given = [f"--config={path}" for path in sweep.base] + [f"--{name}={text(value)}" for name, value in flags.items()]
    if "steps" in sweep.budget:
        given.append(f"--trainer.max_steps={round(sweep.budget['steps'])}")
    if "tokens" in sweep.budget:
        given.append(f"--trainer.max_steps={steps(sweep.budget['tokens'], {**known.flags, **_short(flags)}, known)}")
    if "minutes" in sweep.budget:
        seconds = round(60 * sweep.budget["minutes"])
        clock = f"{seconds // 86400:02}:{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        given.append(f"--trainer.max_time={clock}")
    return given


def steps(tokens: float, flags: Flags, known: ResolvedBaseline) -> int:
    """Optimizer steps that see so many tokens, at least one.

    Args:
        tokens: Of the whole run.
        flags: Of the run, by short name.
        known: How many processes a step is shared by.

    Raises:
        UserError: The data's flags do not say how many tokens a step has.
    """
    a_step = flags.get("data.tokens_per_step")
    if a_step is None:
        parts = [flags.get(name) for name in ("data.batch_size", "data.block_size", "trainer.accumulate_grad_batches")]
        if None in parts:
            raise UserError("budget: these data do not say how many tokens a step has; give steps instead of tokens")
        a_step = known.replicas
        for part in parts:
            a_step *= int(str(part))
    return max(1, round(tokens / int(a_step)))


def experiment(sweep: Sweep, assignment: Assignment, given: list[str], seed: int) -> str:
    """The name of a run's folder: what it is, and a fingerprint of all that it is made from.

    The same run of two sweeps has the same name: what is finished is found again when a file grows by a line.
    """
    words = "_".join(f"{each:.6g}" if isinstance(each, float) else str(each) for each in assignment.values())
    made_from = [given, seed, [path.read_text(encoding="utf-8") for path in sweep.base]]
    return f"{re.sub(r'[^A-Za-z0-9_.+-]+', '-', words)[:60].strip('-.')}_seed_{seed}_{digest(made_from)}"


def shown(given: list[str], seed: int) -> str:
    """A command for a terminal."""
    return shlex.join(["python", "-m", FIT, *given, f"--seed_everything={seed}"])


def text(value: Any) -> str:
    """A value as a flag has it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def short(name: str) -> str:
    """A flag's name as a user writes it."""
    return name.replace(".init_args", "").removesuffix(".class_path")


def _short(flags: Flags) -> Flags:
    return {short(name): value for name, value in flags.items()}
