"""What ``fit`` would say of the flags of a sweep, before any run is begun."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lit_gpt_scratch.checkpoint.config_diff import flatten
from lit_gpt_scratch.cli.config_files import config_to_dict
from lit_gpt_scratch.cli.error_formatting import silence_libraries, user_errors
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.build_command import ResolvedBaseline, arguments, short
from lit_gpt_scratch.sweeps.sweep_config import Assignment, Sweep, nearest


class _ParseOnlyCLI(FitCLI):
    """Reads flags, and builds nothing."""

    def instantiate_classes(self) -> None:
        """Not here."""


def check_sweep(sweep: Sweep) -> ResolvedBaseline:
    """Let ``fit`` read every value that the sweep file names, and build the baseline.

    Settings that are wrong only beside each other are not found; such a trial fails, and says why.

    Raises:
        UserError: A flag is unknown, or a value cannot be.
    """
    silence_libraries()
    parser = _ParseOnlyCLI([f"--config={path}" for path in sweep.base])
    names = [short(name) for name in flatten(config_to_dict(parser.parser, parser.config))]
    for assignment in _each_setting(sweep):
        _parse(parser, sweep, assignment, names)
    built = FitCLI(_without_budget(sweep, sweep.first))
    flags = {short(name): value for name, value in flatten(config_to_dict(built.parser, built.config)).items()}
    known = ResolvedBaseline(flags, built.trainer.world_size)
    arguments(sweep, sweep.first, known)
    return known


def _parse(parser: FitCLI, sweep: Sweep, assignment: Assignment, names: Sequence[str]) -> None:
    try:
        with user_errors():
            parser.parse_arguments(parser.parser, _without_budget(sweep, assignment))
    except UserError as error:
        said = str(error)
        for name in map(short, sweep.flags(assignment)):
            leaf = name.rpartition(".")[2]  # a class' own parser calls its flags by their last names
            if name not in names and re.search(rf"--{re.escape(name)}\b|['\"]{re.escape(leaf)}['\"]", said):
                place = "fixed" if name in map(short, sweep.fixed) else "vary"
                raise UserError(f"{place}: fit has no flag {name}{nearest(name, names)}") from error
        raise UserError(f"fit says: {said}") from error


def _each_setting(sweep: Sweep) -> Iterator[Assignment]:
    """The baseline, and every setting that can be named beside it."""
    yield sweep.first
    for name, each in sweep.vary.items():
        for setting in each.samples():
            if setting != sweep.first[name]:
                yield sweep.first | {name: setting}


def _without_budget(sweep: Sweep, assignment: Assignment) -> list[str]:
    """A budget of tokens is made into steps by what is learned here."""
    budget = {what: amount for what, amount in sweep.budget.items() if what != "tokens"}
    return arguments(replace(sweep, budget=budget), assignment, ResolvedBaseline())
