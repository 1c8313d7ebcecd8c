"""Scan the command line for flags that affect how other flags are parsed, before the parser runs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.checkpoint.config_diff import flatten
from lit_gpt_scratch.cli.config_files import find_config, read_config
from lit_gpt_scratch.cli.moved_class_paths import replace_moved_class_paths
from lit_gpt_scratch.trust import find_import_paths

LIST: Final = "list"
"""Value of ``--config`` and ``--preset`` that lists all choices."""
CONFIG: Final = ("--config", "-c")
HELP: Final = ("--help", "-h")
PRINT_CONFIG: Final = "--print_config"


@dataclass
class EarlyFlags:
    """Flags that change the parser's defaults, with their values on the command line and in config files.

    The defaults from the preset, the pretrained model or the resumed run must be set before the parser reads the other
    flags, which override these defaults. Scanning for early flags first means that everything is parsed only once.

    Attributes:
        flags: All command-line arguments, in which names of shipped experiments are replaced with file paths, and old
            class paths with current ones.
        help: Argument of ``--help``: ``None`` if the flag is not given, ``""`` if it has no argument.
        print_config: Whether ``--print_config`` is given without options such as ``comments``.
        lists: The flag whose value is ``list`` (``--config`` or ``--preset``), or None if there is none.
    """

    flags: list[str]
    help: str | None = None
    lists: str | None = None
    print_config: bool = False
    _given: dict[str, str] = field(default_factory=dict)
    _configs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def scan(cls, flags: Sequence[str]) -> "EarlyFlags":
        """Scan a command line for flags of the form ``--flag value`` or ``--flag=value``, and read the given configs.

        Raises:
            UserError: A config file does not exist.
        """
        early = cls([replace_moved_class_paths(flag) for flag in flags])
        for place, flag in enumerate(early.flags):
            if not flag.startswith("-"):
                continue
            name, equals, value = flag.partition("=")
            after = early.flags[place + 1] if place + 1 < len(early.flags) else None
            if name in HELP:
                early.help = value if equals else after if after and not after.startswith("-") else ""
            value = value if equals else after or ""
            early._given[name] = value
            if name in (*CONFIG, "--preset") and value == LIST:
                early.lists = CONFIG[0] if name in CONFIG else name
            elif name in CONFIG and (equals or after is not None):
                path = find_config(value)
                early.flags[place if equals else place + 1] = f"{name}={path}" if equals else path
                early._configs.append(read_config(path))
        early.print_config = PRINT_CONFIG in early.flags
        early.flags = [flag for flag in early.flags if flag != PRINT_CONFIG]
        return early

    def get(self, name: str) -> str | None:
        """Return the last value of a flag such as ``model.init_from``, or None if it is not set.

        Flags on the command line override configs.
        """
        value: Any = self._given.get(f"--{name}")
        for config in reversed(self._configs):
            if value is not None:
                break
            value = _look_up(config, name)
        return None if value in (None, "null") else str(value)

    def on_command_line(self, name: str) -> str | None:
        """Return the last value of a flag on the command line, or None if it is not given there."""
        return self._given.get(f"--{name}")

    @property
    def trusted(self) -> frozenset[str]:
        """Import paths that the user specified in ``--trust``, in other flags or in their own configs.

        Values that are paths of existing files or folders are skipped, because other people may have named them.
        """
        values = [flag.partition("=")[2] if flag.startswith("-") else flag for flag in self.flags]
        values += [str(value) for config in self._configs for value in flatten(config).values()]
        named = (value for value in values if not os.path.exists(value))  # noqa: PTH110 - values may be invalid paths
        return frozenset(path for value in named for path in find_import_paths(value))

    def class_of(self, part: str) -> str | None:
        """Return the class name or import path that the user selected for ``model`` or ``data``, if any."""
        named = self.get(part)
        return named if named and not Path(named).is_file() else None


def _look_up(config: dict[str, Any], name: str) -> Any:
    found: Any = config
    for key in name.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get("init_args", found) if key not in found and "init_args" in found else found
        found = found.get(key) if isinstance(found, dict) else None
    return found.get("class_path") if isinstance(found, dict) else found
