"""The shape of a model by name, below what configs and flags say."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from lit_gpt_scratch.checkpoint.init_from import load_initial_metadata
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.presets import PRESETS


def find_preset(flags: Sequence[str]) -> str | None:
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


def apply_init_from(parser: ArgumentParser, config: Namespace) -> bool:
    """Make the shape of the trained model that a run is to begin with the parser's default, and its context.

    Args:
        parser: It is changed.
        config: The flags, as parsed so far.

    Returns:
        Whether there is such a model; the flags are then to be parsed again.

    Raises:
        UserError: The model cannot be read, or a preset is named as well.
    """
    model, data = config.model.init_args, config.data.init_args
    if (place := model.get("init_from")) is None:
        return False
    if config.preset is not None:
        raise UserError("--preset names a shape, but model.init_from brings one; leave one of them out")
    contents = load_initial_metadata(place)
    # Whose code runs is for flags and configs to say, not for a checkpoint.
    gpt = {**asdict(GPTConfig()), **contents.gpt, "attention": None}
    module, _, name = config.model.class_path.rpartition(".")
    if not getattr(getattr(import_module(module), name), "allows_dropout", True):
        gpt["dropout"] = 0.0
    _set_default_arguments(parser, "model", config.model.class_path, gpt=gpt)
    if "block_size" in data:
        _set_default_arguments(parser, "data", config.data.class_path, block_size=contents.block_size)
    return True


def _set_default_arguments(parser: ArgumentParser, part: str, class_path: str, **arguments: Any) -> None:
    """Change some default arguments of a class, and leave the others as they are."""
    before = parser.get_default(part)
    others = before.get("init_args", {}) if before.get("class_path") == class_path else {}
    parser.set_defaults({part: {"class_path": class_path, "init_args": {**others, **arguments}}})


def apply_preset(parser: ArgumentParser, name: str | None) -> None:
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
