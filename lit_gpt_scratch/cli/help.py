"""``--help`` of ``fit`` and ``prepare``: common flags, all flags, or flags that match a search word.

The parser does not list the flags of classes selected by a flag, such as those of the model and the data. They are
collected here from the signatures and docstrings of these classes, including nested classes.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from typing import Any, Final, Literal, get_args, get_origin

import torch
from jsonargparse import ArgumentParser, Namespace

from lit_gpt_scratch.cli.config_defaults import LOG_EVERY, MAX_STEPS, TRAINER_DEFAULTS, VALIDATE_EVERY, import_class
from lit_gpt_scratch.distributed.hardware_defaults import default_precision, explain_no_compile
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import default_max_logits_mb

WIDTH: Final = 110
ALL: Final = "all"
COMMON: Final[dict[str, list[str]]] = {
    "run": [
        "experiment", "runs", "config", "preset", "budget", "ckpt_path", "plan", "devices_like", "seed_everything",
        "guard", "checkpoint.every_n_steps", "inspect.every_n_steps",
    ],
    "training": [
        "trainer.max_steps", "trainer.max_epochs", "trainer.max_time", "trainer.precision", "trainer.devices",
        "trainer.strategy", "trainer.val_check_interval", "model.optimizer", "model.optimizer.lr",
    ],
    "data": [
        "data", "data.source", "data.tokenizer", "data.vocab_size", "data.block_size", "data.batch_size",
        "data.tokens_per_step", "data.packing", "data.num_workers", "data.store",
    ],
    "model": [
        "model", "model.gpt.n_layer", "model.gpt.n_head", "model.gpt.n_kv_head", "model.gpt.n_embd",
        "model.gpt.position", "model.gpt.dropout", "model.init_from", "model.lora.rank", "model.compile",
    ],
}  # fmt: skip
"""Flags on the first page of ``--help``, keyed by heading."""
PACKAGES: Final = {"model": "lit_gpt_scratch.tasks", "data": "lit_gpt_scratch.data"}
DEFAULT_CLASSES: Final = {"model": "LanguageModel", "data": "PackedText"}
WITHOUT: Final = {
    "model.init_from": "random weights",
    "model.lora.rank": "no adapters",
    "data.store": "a cache folder",
    "data.tokens_per_step": "one micro-batch",
    "model.gpt.n_kv_head": "same as n_head",
    "trainer.max_epochs": "no limit",
    "trainer.max_time": "no limit",
}
"""Text shown in place of the default for flags whose default is None, keyed by flag."""
REWORDED: Final = {
    "seed_everything": "Seed for weight initialization, data order and all other randomness.",
    "trainer.devices": "Number of devices or processes, a list of device indices, or 'auto' for all devices.",
    "trainer.strategy": "Strategy for multiple devices: ddp, fsdp2, hsdp, tp, fsdp2_tp, or any Lightning strategy.",
    "trainer.precision": "Precision: 32-true, bf16-mixed, bf16-true, 16-mixed, 64-true, or any Lightning precision.",
    "trainer.max_epochs": "Maximum number of passes over the training data.",
    "trainer.max_time": "Maximum training time across all sessions of the run, as DD:HH:MM:SS.",
    "trainer.val_check_interval": "Number of micro-batches between validation runs, a fraction of an epoch such as "
    "0.25, or a duration (DD:HH:MM:SS).",
    "trainer.check_val_every_n_epoch": "Run validation every n epochs. Cannot be combined with a val_check_interval in "
    "steps.",
    "model.optimizer": "Optimizer: AdamW, Muon, or the import path of your own class.",
}
"""Help texts that replace those of Lightning flags and of flags that select a class, keyed by flag."""


@dataclass(frozen=True)
class Flag:
    """Command-line flag and its help text.

    Attributes:
        name: Name without dashes, such as ``model.gpt.n_layer``.
        values: Placeholder for the value, such as ``N``, or its choices; an empty string if the flag takes no value.
        default: Default value as text, or an empty string if there is no default.
        help: Help text, one or more sentences.
    """

    name: str
    values: str
    default: str
    help: str

    def lines(self, brief: bool) -> Iterator[str]:
        """Yield the lines that describe the flag in a terminal; ``brief`` keeps only the first sentence of the help."""
        text = re.split(r"(?<=[^.])[.] ", self.help)[0].rstrip(".") if brief else self.help
        default = f" [{self.default}]" if self.default else ""
        name = f"  --{self.name} {self.values}".rstrip()
        gap = " " * 36
        if brief:
            text = textwrap.shorten(text, max(20, 2 * (WIDTH - len(gap)) - len(default) - 8), placeholder=" ...")
        body = textwrap.wrap(text + default, WIDTH - len(gap)) or [""]
        if len(name) >= len(gap):
            yield name
            name = ""
        yield f"{name:<{len(gap)}}{body[0]}".rstrip()
        yield from (gap + line for line in body[1:])


@dataclass(frozen=True)
class HelpPage:
    """Help page of a command that accepts the flags of ``fit``.

    Args:
        usage: Usage line of the command.
        description: Purpose of the command.
        first: Names of the flags in the overview, keyed by heading.
        without: Prefixes of flags that do not apply to the command.
    """

    usage: str
    description: str
    first: dict[str, list[str]] = field(default_factory=lambda: COMMON)
    without: tuple[str, ...] = ()

    def render(self, parser: ArgumentParser, topic: str, model: str | None, data: str | None) -> str:
        """Render the help for a topic: the overview, all flags, or only the flags that match a search word.

        Args:
            parser: Parser of the command.
            topic: Argument of ``--help``: empty for the overview, ``all`` for all flags, or a search word.
            model: Value of ``--model``, the class whose flags are shown, or None for the default class.
            data: Value of ``--data``, the class whose flags are shown, or None for the default class.

        Raises:
            UserError: No flag matches the search word.
        """
        chosen = {"model": model or DEFAULT_CLASSES["model"], "data": data or DEFAULT_CLASSES["data"]}
        flags = [*parser_flags(parser)]
        for part, name in chosen.items():
            kind = import_class(name, PACKAGES[part])
            if kind is None:
                raise UserError(
                    f"--{part} {name}: class not found in {PACKAGES[part]}; use one of its classes, or an import path"
                )
            flags += class_flags(kind, part)
        sections = {"": [each for each in flags if not each.name.startswith(self.without)]}
        if topic:
            sections |= self._of_other_classes(chosen, {each.name for each in flags})
        if topic in ("", ALL):
            lines = [*(self._first(sections[""], chosen) if not topic else self._all(sections))]
            return "\n".join([f"usage: {self.usage}", "", self.description, "", *lines])
        word = topic.casefold()
        lines = []
        for heading, found in sections.items():
            matching = [each for each in found if word in each.name.casefold() or word in each.help.casefold()]
            lines += [f"\n{heading}:"] * bool(heading and matching)
            lines += [line for each in matching for line in each.lines(brief=False)]
        if not lines:
            raise UserError(f"--help {topic}: no flag mentions {topic}; use --help {ALL} to list all flags")
        return "\n".join(lines)

    def _first(self, flags: list[Flag], chosen: dict[str, str]) -> Iterator[str]:
        known = {each.name: each for each in flags}
        for heading, names in self.first.items():
            found = [known[name] for name in names if name in known]
            label = f" of {chosen[heading]}" if heading in chosen else ""
            yield f"{heading}{label}:"
            yield from (line for each in found for line in each.lines(brief=True))
            yield ""
        command = self.usage.partition(" [")[0]
        yield f"Defaults on this machine are in brackets. To see the rest of the {len(flags)} flags:"
        yield f"  {command} --help {ALL}        all flags"
        yield f"  {command} --help WORD       flags that mention WORD, as in --help dropout"
        if not self.without:
            yield f"  {command} --model DPO --data Preferences --help       flags of another task"
        yield f"  {command} --print_config    all flag values, as a config file"

    def _all(self, sections: dict[str, list[Flag]]) -> Iterator[str]:
        for heading, flags in sections.items():
            yield f"{heading}:" if heading else "flags:"
            yield from (line for each in flags for line in each.lines(brief=False))
            yield ""

    def _of_other_classes(self, chosen: dict[str, str], seen: set[str]) -> dict[str, list[Flag]]:
        """Return the flags of classes that are not selected, keyed by headings such as ``with --model DPO``."""
        found: dict[str, list[Flag]] = {}
        for part, package in PACKAGES.items():
            module = import_module(package)
            for name in module.__all__:
                if name != chosen[part] and part not in self.without:
                    own = class_flags(getattr(module, name), part)
                    found[f"with --{part} {name}"] = [each for each in own if each.name not in seen]
        optimizers = import_module("lit_gpt_scratch.optim")
        for name in optimizers.__all__:
            kind = getattr(optimizers, name)
            if name != "OptimizerRecipe" and hasattr(kind, "build") and "model" not in self.without:
                own = class_flags(kind, "model.optimizer")
                found[f"with --model.optimizer {name}"] = [each for each in own if each.name not in seen]
        return {heading: flags for heading, flags in found.items() if flags}


def parser_flags(parser: ArgumentParser) -> Iterator[Flag]:
    """Yield the flags that the parser itself lists: flags of the trainer and of the run."""
    accelerator = default_precision("auto").value
    known = {"trainer.max_steps": MAX_STEPS, "trainer.precision": accelerator}
    known |= {"trainer.val_check_interval": VALIDATE_EVERY, "trainer.log_every_n_steps": LOG_EVERY}
    known |= {f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()}
    yield Flag(
        "config",
        "FILE",
        "",
        "Config file, or name of a shipped experiment such as finetune/spam; 'list' lists all names.",
    )
    for action in parser._actions:
        if action.dest in ("help", "config", "print_config", "model", "data") or action.dest.endswith(".help"):
            continue
        if type(action).__name__ != "_ActionConfigLoad":
            default = known.get(action.dest, parser.get_default(action.dest))
            yield _flag(action, action.dest, default)


def class_flags(kind: Any, prefix: str) -> Iterator[Flag]:
    """Yield the flags of a class and of its nested classes.

    Args:
        kind: Class whose arguments are flags.
        prefix: Flag whose value is the class: ``model``, ``data``, or a nested flag such as ``model.optimizer``.
    """
    if prefix in PACKAGES:
        names = ", ".join(import_module(PACKAGES[prefix]).__all__)
        purpose = "Training task" if prefix == "model" else "Data module"
        yield Flag(prefix, "CLASS", kind.__name__, f"{purpose}: {names}, or the import path of your own class.")
    parser = ArgumentParser()
    parser.add_class_arguments(kind, prefix)
    arguments = {action.dest.removeprefix(f"{prefix}."): action.default for action in parser._actions}
    own = kind.default_arguments(arguments) if hasattr(kind, "default_arguments") else {}
    for action in parser._actions:
        name = action.dest
        if name == "help" or name.endswith(".help") or type(action).__name__ == "_ActionConfigLoad":
            continue
        hint = getattr(action, "_typehint", None)
        nested = next((each for each in (hint, *get_args(hint)) if inspect.isclass(each) and is_dataclass(each)), None)
        if nested is not None and nested.__module__.startswith("lit_gpt_scratch."):
            yield from class_flags(nested, name)
            continue
        default = action.default
        if (
            isinstance(default, Namespace) and "class_path" in default
        ):  # a class with its own flags, such as an optimizer
            chosen = import_class(default.class_path, "lit_gpt_scratch.optim")
            yield _flag(action, name, chosen.__name__)
            yield from class_flags(chosen, name)
            continue
        if default is None:
            default = own.get(name.removeprefix(f"{prefix}."))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if name == "model.compile":
            default = "blocks" if explain_no_compile(device) is None else False
        elif name == "model.max_logits_mb":
            default = default_max_logits_mb(device)
        yield _flag(action, name, default)


def _flag(action: Any, name: str, default: Any) -> Flag:
    text = REWORDED.get(name) or " ".join((action.help or "").replace("``", "").split())
    text = re.sub(r"\s*Default: (?:[^.]|\.\d)*\.\s*$", "", text)
    shown = "" if default is None or action.nargs == 0 else _plain(default)
    return Flag(name, _values(action), WITHOUT.get(name, shown), text)


def _values(action: Any) -> str:
    if action.nargs == 0:
        return ""
    if action.dest == "seed_everything":
        return "N"
    hint = getattr(action, "_typehint", None)
    kinds = [hint] if get_origin(hint) is Literal else [each for each in get_args(hint) if each is not type(None)]
    kinds = kinds or [hint]
    if any(get_origin(each) is Literal for each in kinds):
        choices = [str(choice) for each in kinds if get_origin(each) is Literal for choice in get_args(each)]
        choices += ["true", "false"] * (bool in kinds)
        text = "|".join(choices)
        return text if len(text) <= 40 else "NAME"
    named = {int: "N", float: "X", bool: "true|false", str: "TEXT"}
    if inspect.isclass(hint) and hint not in named:
        return "CLASS"
    return next((named[each] for each in kinds if each in named), "TEXT" if hint is None else "VALUE")


def _plain(value: Any) -> str:
    """Format a default value as a user would write it; an object is shown as the name of its class."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)  # 1.0, not 1: some flags interpret a float as a fraction and an integer as a count
    return str(value.class_path).rpartition(".")[2] if isinstance(value, Namespace) else type(value).__name__
