"""Find, parse and save config files: shipped experiments, user files, and the ``config.yaml`` of a run."""

import json
import os
import re
import sys
import textwrap
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import lightning as L
import yaml
from jsonargparse import ArgumentParser, Namespace, _loaders_dumpers, _typehints, set_loader
from jsonargparse._loaders_dumpers import get_loader_exceptions
from lightning.pytorch.cli import LightningArgumentParser

import lit_gpt_scratch
from lit_gpt_scratch.bounded_yaml import parse_yaml, require_bounded_yaml
from lit_gpt_scratch.callbacks.checkpointing import RunDirCallback
from lit_gpt_scratch.cli.config_defaults import unset_defaults
from lit_gpt_scratch.cli.error_formatting import parser_keys
from lit_gpt_scratch.cli.moved_class_paths import replace_moved_class_paths
from lit_gpt_scratch.errors import UserError, describe_yaml_error, exception_chain
from lit_gpt_scratch.lightning_compat import restrict_imports
from lit_gpt_scratch.model.config import custom_classes
from lit_gpt_scratch.schema import describe
from lit_gpt_scratch.tasks.rl.reward_functions import is_checkpoint_path
from lit_gpt_scratch.text.verifiable_rewards import VERIFIABLE_REWARDS
from lit_gpt_scratch.trust import (
    OWN_PACKAGES,
    UntrustedCodeError,
    record_written_config,
    require_trusted,
    was_written_here,
)

EXPERIMENTS: Final = Path(lit_gpt_scratch.__file__).parents[1] / "experiments"
"""Folder of the shipped experiments, which exists in a clone of the repository but not in an installed package."""


_rank_union_member = _typehints.union_subtype_sort_key


def _rank_numbers_first(member: Any) -> int:
    """Return the sort key of a union member, so that the parser tries int first, then float, then the other members.

    ``typing`` caches unions and considers ``Union[int, float]`` and ``Union[float, int]`` equal, so the member order of
    a Trainer flag depends on which of them an imported library created first. With float first, the parser would
    convert ``--trainer.limit_val_batches 1`` (one batch) to 1.0 (all batches).
    """
    return {int: -2, float: -1}.get(member) or _rank_union_member(member)


def _load_bounded_yaml(text: str) -> Any:
    """Check the size of a YAML value, then load it as the parser does; used for flag values and files passed to flags.

    Raises:
        UserError: The value is too large or nested too deeply.
    """
    try:
        require_bounded_yaml(text)
    except UserError as error:
        raise UserError(f"a flag value, or a file passed to a flag, {error}") from error
    return _loaders_dumpers.yaml_load(text)  # type: ignore[no-untyped-call]


set_loader("yaml", _load_bounded_yaml, get_loader_exceptions("yaml"))

_typehints.union_subtype_sort_key = _rank_numbers_first  # type: ignore[assignment]  # parameter name differs


class FitParser(LightningArgumentParser):
    """Lightning's parser, extended to read configs from earlier versions of this package and from existing runs."""

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """Parse the command line.

        Raises:
            UserError: A file passed to a flag does not contain valid settings for that flag. The parser's own error
                message would quote the file.
        """
        try:
            config: Namespace = super().parse_args(args, *rest, **kwargs)
        except (ArgumentError, UnicodeDecodeError) as error:
            concerned = f"--{'.'.join(parser_keys(exception_chain(error)))}"
            for flag, value in _flags_with_files(sys.argv[1:] if args is None else args):
                if flag == concerned or _is_undecodable(value, error):
                    raise UserError(f"{flag} {value}: the file does not contain valid settings for {flag}") from error
            raise
        return config

    def parse_string(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Namespace:
        """Parse the text of a config file.

        The ``config.yaml`` of a run contains all default values. This method resets arguments that equal their
        class default to ``None``, so that a flag that selects another class also selects the defaults of that class.
        Arguments that are not changed by a flag are resolved to the same defaults again.
        """
        groups = {action.dest.partition(".")[0] for action in self._actions if "." in action.dest}
        _require_mappings(content, path, groups)
        try:
            config: Namespace = super().parse_string(replace_moved_class_paths(content), path, *args, **kwargs)
        except ArgumentError as error:
            for cause in exception_chain(error):
                if isinstance(cause, yaml.YAMLError):  # the parser's loader accepts fewer characters
                    raise _invalid_yaml(path, cause) from error
            raise
        unset_defaults(config)
        return config


def _require_mappings(content: str, path: Any, groups: set[str]) -> None:
    """Check that a config file and its groups of flags are YAML mappings; a group may also be a path to another file.

    The parser's own error messages would quote the whole file, and it accepts numbers and lists as groups.

    Raises:
        UserError: The file is not a config.
    """
    try:
        loaded = parse_yaml(content)
    except UserError as error:
        raise UserError(f"{_flag_of(path)}: the file {error}") from error
    except yaml.YAMLError as error:
        raise _invalid_yaml(path, error) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{_flag_of(path)} is not a config; it must be a YAML mapping of flags to values")
    for group in sorted(groups & loaded.keys()):
        if not isinstance(loaded[group], dict | str):
            raise UserError(
                f"{_flag_of(path)}: {group} is {describe(loaded[group])}; it must be a mapping of flags to values"
            )


def _invalid_yaml(path: Any, error: yaml.YAMLError) -> UserError:
    return UserError(f"{_flag_of(path)}: not valid YAML: {describe_yaml_error(error)}")


def _flag_of(path: Any) -> str:
    return f"--config {path}" if path else "--config"


def _flags_with_files(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield a (flag, value) pair for each flag whose value is the path of a file."""
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, equals, value = argument.partition("=")
        value = value if equals else following
        if flag.startswith("--") and os.path.isfile(value):
            yield flag, value


def _is_undecodable(path: str, error: Exception) -> bool:
    """Return whether an error was raised because this file cannot be decoded."""
    if not isinstance(error, UnicodeDecodeError):
        return False
    with Path(path).open("rb") as file:
        return file.read(len(error.object)) == error.object


def find_config(name: str) -> str:
    """Return the path of the config file passed to ``--config``.

    Args:
        name: Path to a file, or name of a shipped experiment such as ``finetune/spam``. An existing path takes
            precedence.

    Raises:
        UserError: The file does not exist.
    """
    if Path(name).exists() or "{" in name or "://" in name:  # a config may also be given as text or as a URL
        return name
    shipped = EXPERIMENTS / f"{name.removesuffix('.yaml')}.yaml"
    if name and shipped.is_file():
        return str(shipped)
    if EXPERIMENTS.is_dir():
        raise UserError(
            f"--config {name}: file not found, and no shipped experiment has this name; "
            "use --config list to list all experiments"
        )
    raise UserError(
        f"--config {name}: file not found; to use a shipped experiment, install the package from a clone of the "
        f"repository, because {EXPERIMENTS} does not exist"
    )


def describe_experiments() -> str:
    """Format a list of the shipped experiments, each with the first line of its leading comment.

    Raises:
        UserError: The experiments are not installed.
    """
    if not EXPERIMENTS.is_dir():
        raise UserError(
            f"--config list: {EXPERIMENTS} does not exist, because the experiments are not part of the package; "
            "install the package from a clone of the repository"
        )
    found = []
    for path in sorted(EXPERIMENTS.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        content = parse_yaml(text)
        if isinstance(content, dict) and {"model", "data", "trainer", "preset"} & content.keys():
            comment = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
            found.append((path.relative_to(EXPERIMENTS).with_suffix("").as_posix(), comment))
    width = max(len(name) for name, _ in found)
    return "\n".join(f"{name:<{width}}  {textwrap.shorten(comment, 80, placeholder=' ...')}" for name, comment in found)


def read_config(path: str) -> dict[str, Any]:
    """Read a config file as nested dicts; return an empty dict on an error, which the parser will report."""
    try:
        content = parse_yaml(replace_moved_class_paths(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


WRITING_FLAGS: Final = ("callbacks", "logger", "profiler", "plugins")
"""Trainer flags for classes that may write files to any folder, depending on their arguments."""


def find_writers(config: Namespace) -> Iterator[tuple[str, str]]:
    """Yield a (flag, name) pair for each Trainer flag value that may write files outside the run folder.

    The name is the value to pass to ``--trust``: the import path of the class or, for ``default_root_dir``, the flag.
    """
    for flag in WRITING_FLAGS:
        value = config.get(f"trainer.{flag}")
        for each in value if isinstance(value, list) else [value]:
            name = each.get("class_path") if isinstance(each, Namespace) else None
            if name is not None and not name.startswith("lit_gpt_scratch."):
                yield f"trainer.{flag}", name
    if config.get("trainer.default_root_dir") is not None:
        yield "trainer.default_root_dir", "trainer.default_root_dir"


def parse_run_config(parser: ArgumentParser, path: Path, trusted: Collection[str]) -> Namespace:
    """Parse the ``config.yaml`` of a resumed run; parsing imports the classes in the config.

    A config that ``fit`` wrote for this user may refer to any code, like the user's own configs.

    Args:
        parser: Parser of ``fit``.
        path: Path to the config.
        trusted: Import paths that the config may contain; ignored if ``fit`` wrote the config for this user.

    Raises:
        UserError: The config refers to code that is not trusted, or has settings that may write files to any folder.
    """
    arguments = ["--config", str(path)]
    try:
        own = was_written_here(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):  # reported by the parser
        own = False
    if own:
        return parser.parse_args(arguments)
    try:
        with restrict_imports([*OWN_PACKAGES, *trusted]):
            config = parser.parse_args(arguments)
    except ArgumentError as error:
        if denied := re.search(r"Importing '([\w.]+)' is not allowed", str(error)):
            raise UntrustedCodeError(str(path), denied[1]) from error
        raise
    for flag, name in find_writers(config):
        if name not in trusted:
            raise UserError(
                f"{path} sets {flag}, which may write files to any folder; if you trust this file, pass --trust {name}"
            )
    gpt = config.get("model.init_args.gpt")
    for name in custom_classes(vars(gpt) if gpt else {}).values():
        require_trusted(name, trusted, path)
    reward = config.get("model.init_args.reward")
    if not (reward is None or is_checkpoint_path(reward) or reward in VERIFIABLE_REWARDS):
        require_trusted(reward, trusted, path)
    return config


class SaveConfig(RunDirCallback):
    """Callback that writes ``config.yaml`` into the run folder when training starts, after all checks have passed.

    Args:
        parser: Parser that parsed the flags.
        config: Values of all flags, with defaults resolved.
    """

    def __init__(self, parser: ArgumentParser, config: Namespace) -> None:
        self.parser = parser
        self.config = config

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write all flags except ``ckpt_path``, ``force`` and ``trust``, so that ``--config`` can repeat the run."""
        if self.folder and trainer.is_global_zero:
            config = self.config.clone()
            config.ckpt_path, config.force, config.trust = None, False, None
            text = self.parser.dump(config, skip_unset=False)
            record_written_config(text, restricted=any(find_writers(config)))
            self.folder.write_text(self.folder.config.name, text)


def config_to_dict(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """Convert a config to nested dicts with the structure of its YAML file, so that configs can be compared."""
    nested: dict[str, Any] = json.loads(parser.dump(config, format="json", skip_unset=False, skip_validation=True))
    return nested
