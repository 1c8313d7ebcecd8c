"""The shape of a model by name, below what configs and flags say."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.presets import PRESETS


def named_preset(flags: Sequence[str]) -> str | None:
    """What the last ``--preset`` says, or else the last config with a ``preset`` in it.

    It has to be known before the parser reads the flags, because it is what they change.
    """
    given: dict[str, list[str]] = {"--preset": [], "--config": []}
    for flag, after in pairwise([*flags, ""]):
        name, equals, value = flag.partition("=")
        if name in given:
            given[name].append(value if equals else after)
    if given["--preset"]:
        return given["--preset"][-1]
    for path in reversed(given["--config"]):
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # the parser will say what is wrong with it
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            if isinstance(content, dict) and content.get("preset") is not None:
                return str(content["preset"])
    return None


def begin_with_preset(parser: ArgumentParser, name: str | None) -> None:
    """Make the shape the parser's default.

    Raises:
        UserError: There is no preset of this name.
    """
    if name is None:
        return
    if name not in PRESETS:
        raise UserError(f"--preset is {name}; it must be one of {', '.join(PRESETS)}")
    parser.set_defaults(
        {
            "model": {
                "class_path": "lit_gpt_scratch.tasks.LanguageModel",
                "init_args": {"gpt": asdict(PRESETS[name])},
            }
        }
    )
