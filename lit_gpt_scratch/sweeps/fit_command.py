"""Build ``fit`` commands and run-folder names for the runs of a sweep."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.search_space import FitFlags
from lit_gpt_scratch.sweeps.sweep_config import Assignment, SweepConfig, short_hash

FIT_MODULE = "lit_gpt_scratch.fit"
"""Name of the Python module that every run executes."""


@dataclass(frozen=True)
class ResolvedBaseline:
    """All flags of the baseline, including the defaults of ``fit``, as stored in the study.

    Args:
        flags: Values of all flags, keyed by short name (see ``short_flag``).
        replicas: Number of data-parallel processes, each of which reads different samples.
    """

    flags: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1


def build_arguments(sweep: SweepConfig, assignment: Assignment, baseline: ResolvedBaseline | None) -> list[str]:
    """Return the command-line arguments of ``fit`` for a trial, except for the seed and the run folder.

    Args:
        sweep: The parsed sweep file.
        assignment: Settings of the trial.
        baseline: All flags of the baseline, or None to omit a token budget, which cannot be converted without them.

    Raises:
        UserError: The token budget cannot be converted to optimizer steps.
    """
    flags, budget = sweep.fit_flags(assignment), sweep.budget_of(assignment)
    arguments = [f"--config={path}" for path in sweep.base]
    arguments += [f"--{name}={format_flag_value(value)}" for name, value in flags.items()]
    if "steps" in budget:
        arguments.append(f"--trainer.max_steps={round(budget['steps'])}")
    if "tokens" in budget and baseline is not None:
        overridden = {**baseline.flags, **{short_flag(name): value for name, value in flags.items()}}
        steps = tokens_to_steps(budget["tokens"], overridden, baseline.replicas)
        arguments.append(f"--trainer.max_steps={steps}")
    if "minutes" in budget:
        seconds = round(60 * budget["minutes"])
        clock = f"{seconds // 86400:02}:{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        arguments.append(f"--trainer.max_time={clock}")
    return arguments


def tokens_to_steps(tokens: float, flags: FitFlags, replicas: int) -> int:
    """Convert a token budget to a number of optimizer steps, which is at least 1.

    Args:
        tokens: Total number of training tokens in the run.
        flags: Flags of the run, keyed by short name.
        replicas: Number of data-parallel processes.

    Raises:
        UserError: The number of tokens per step cannot be computed from the flags.
    """
    tokens_per_step = flags.get("data.tokens_per_step")
    if tokens_per_step is None:
        names = ("data.batch_size", "data.block_size", "trainer.accumulate_grad_batches")
        factors = [flags.get(name) for name in names]
        if None in factors:
            raise UserError(
                "budget: the number of tokens per step is unknown for this data module; set a budget in steps instead"
            )
        tokens_per_step = replicas
        for factor in factors:
            tokens_per_step *= int(str(factor))
    return max(1, round(tokens / int(tokens_per_step)))


def experiment_name(sweep: SweepConfig, assignment: Assignment, arguments: list[str], seed: int) -> str:
    """Return the folder name of a run, built from its settings and a hash of everything that determines the run.

    The name of a run does not depend on the sweep, so finished runs are reused when the sweep file is extended.
    """
    settings = "_".join(f"{each:.6g}" if isinstance(each, float) else str(each) for each in assignment.values())
    content = [arguments, seed, [path.read_text(encoding="utf-8") for path in sweep.base]]
    return f"{re.sub(r'[^A-Za-z0-9_.+-]+', '-', settings)[:60].strip('-.')}_seed_{seed}_{short_hash(content)}"


def format_command(arguments: list[str], seed: int) -> str:
    """Return the shell command that executes a run."""
    return shlex.join(["python", "-m", FIT_MODULE, *arguments, f"--seed_everything={seed}"])


def format_flag_value(value: Any) -> str:
    """Format a flag value for the command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def short_flag(name: str) -> str:
    """Return a flag name without the components ``init_args`` and ``class_path``."""
    return name.replace(".init_args", "").removesuffix(".class_path")
