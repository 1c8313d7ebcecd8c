"""Check the flags of a sweep file with the parser of ``fit`` before the first run starts."""

import re
from collections.abc import Iterator, Sequence

from lit_gpt_scratch.checkpoint.config_diff import flatten
from lit_gpt_scratch.cli.config_files import config_to_dict
from lit_gpt_scratch.cli.error_formatting import silence_libraries, user_errors
from lit_gpt_scratch.cli.fit import FitCLI
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.sweeps.fit_command import ResolvedBaseline, build_arguments, short_flag
from lit_gpt_scratch.sweeps.sweep_config import Assignment, SweepConfig, suggest_closest


class _ParseOnlyCLI(FitCLI):
    """Command-line interface that parses flags without instantiating any classes."""

    def instantiate_classes(self) -> None:
        """Do nothing."""


def check_sweep(sweep: SweepConfig) -> ResolvedBaseline:
    """Parse every setting of a sweep file as ``fit`` would, and resolve the flags of the baseline.

    Each setting is checked on its own, with the baseline values of all other flags. Contradictions between settings are
    not detected; a trial with contradictory settings fails and reports the reason.

    Returns:
        The flags of the baseline and its number of replicas.

    Raises:
        UserError: A flag is unknown or a value is invalid.
    """
    silence_libraries()
    cli = _ParseOnlyCLI([f"--config={path}" for path in sweep.base])
    known_flags = [short_flag(name) for name in flatten(config_to_dict(cli.parser, cli.config))]
    for assignment in _each_setting(sweep):
        _check_assignment(cli, sweep, assignment, known_flags)
    built = FitCLI(build_arguments(sweep, sweep.baseline_assignment, baseline=None))
    flags = {short_flag(name): value for name, value in flatten(config_to_dict(built.parser, built.config)).items()}
    baseline = ResolvedBaseline(flags, built.trainer.world_size)
    build_arguments(sweep, sweep.baseline_assignment, baseline)
    return baseline


def _check_assignment(cli: FitCLI, sweep: SweepConfig, assignment: Assignment, known_flags: Sequence[str]) -> None:
    try:
        with user_errors():
            cli.parse_arguments(cli.parser, build_arguments(sweep, assignment, baseline=None))
    except UserError as error:
        message = str(error)
        for name in map(short_flag, sweep.fit_flags(assignment)):
            leaf = name.rpartition(".")[2]  # a class parser reports only the last component of a flag
            mentioned = re.search(rf"--{re.escape(name)}\b|['\"]{re.escape(leaf)}['\"]", message)
            if name not in known_flags and mentioned:
                section = "fixed" if name in map(short_flag, sweep.fixed) else "vary"
                raise UserError(f"{section}: fit has no flag {name}{suggest_closest(name, known_flags)}") from error
        raise UserError(f"fit: {message}") from error


def _each_setting(sweep: SweepConfig) -> Iterator[Assignment]:
    """Yield the baseline and then, for each example setting, the baseline with only this setting changed."""
    baseline = sweep.baseline_assignment
    yield baseline
    for name, dimension in sweep.vary.items():
        for setting in dimension.example_settings():
            if setting != baseline[name]:
                yield baseline | {name: setting}
