"""Resolve the defaults that depend on a preset, a pretrained model, a class or the machine."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from typing import Any, Final

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule

from lit_gpt_scratch.checkpoint.init_from import InitialModel
from lit_gpt_scratch.data.prepare_tokens import DEFAULT_VOCAB_SIZE
from lit_gpt_scratch.distributed.hardware_defaults import default_precision, explain_no_compile
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.cross_entropy import default_max_logits_mb
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.config import custom_classes
from lit_gpt_scratch.model.presets import PRESETS
from lit_gpt_scratch.optim import Schedule
from lit_gpt_scratch.tasks.gpt_module import GPTModule
from lit_gpt_scratch.trust import Trusted, UntrustedCodeError, import_object, require_trusted

MAX_STEPS: Final = 900
"""Default of ``trainer.max_steps`` if none of ``max_steps``, ``max_epochs`` and ``max_time`` is set."""
VALIDATE_EVERY: Final = 300
"""Default of ``trainer.val_check_interval``, in micro-batches, if ``check_val_every_n_epoch`` is not set."""
LOG_EVERY: Final = 10
"""Default of ``trainer.log_every_n_steps``, except in the ``barebones`` mode, which logs nothing."""
PUBLISHED_VOCABULARIES: Final = {
    "gpt2": 50_257, "llama3": 128_256, "qwen3": 151_936, "qwen2.5": 151_936, "olmo2": 100_352, "smollm3": 128_256,
    "gemma2": 256_000, "gemma3": 262_144,
}  # fmt: skip
"""Vocabulary sizes of the published models, keyed by preset family; other presets use the default vocabulary size."""
TRAINER_DEFAULTS: Final[dict[str, Any]] = {
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "limit_test_batches": 1.0,
    "limit_predict_batches": 1.0,
    "gradient_clip_algorithm": "norm",
}
"""Values that Lightning uses for trainer arguments set to ``null``."""


DEFAULTS_0_1: Final[dict[str, dict[str, float]]] = {
    "Muon": {"lr": 0.02, "weight_decay": 0.0},
    "AdamW": {"lr": 3e-3, "weight_decay": 0.1},
    "wsd": {"decay_share": 0.4},
    "linear": {"decay_share": 1.0},
    "cosine": {"decay_share": 1.0},
}
"""Values that version 0.1 used for arguments stored as ``null`` in a config, keyed by optimizer class or decay."""


def apply_preset(parser: ArgumentParser, name: str | None) -> None:
    """Set the parser's default architecture to that of a preset; configs and flags override this default.

    Raises:
        UserError: The preset does not exist.
    """
    if name is None:
        return
    if name not in PRESETS:
        raise UserError(f"--preset is {name}; it must be one of {', '.join(PRESETS)}")
    _set_default_arguments(parser, "model", gpt=asdict(PRESETS[name]))


def apply_init_from(
    parser: ArgumentParser, place: str | None, task: str | None, preset: str | None, trusted: Trusted = None
) -> InitialModel | None:
    """Set the parser's default architecture and context length to those of the pretrained model, if there is one.

    Args:
        parser: Parser whose defaults are changed.
        place: Value of ``model.init_from``, the path of the pretrained model, or None if there is none.
        task: Class name or import path of the task, or None for the default task.
        preset: Value of ``--preset``.
        trusted: Import paths of the code that the pretrained model may import.

    Returns:
        The pretrained model, or None if ``place`` is None.

    Raises:
        UserError: The model cannot be read, or a preset is also given.
    """
    if place is None:
        return None
    if preset is not None:
        raise UserError("--preset and model.init_from both specify an architecture; omit one of them")
    initial = InitialModel.read(place)
    metadata = initial.metadata
    gpt = {**asdict(GPTConfig()), **metadata.gpt}
    for field, name in custom_classes(gpt).items():
        try:
            require_trusted(name, trusted, initial.path)
        except UntrustedCodeError:  # reported when the model is built, unless a flag names the same class
            gpt[field] = getattr(GPTConfig, field)
    task_class = import_class(task or "LanguageModel", "lit_gpt_scratch.tasks")
    if not getattr(task_class, "allows_dropout", True):
        gpt["dropout"] = 0.0
    if not getattr(task_class, "predicts_ahead", True):
        gpt["multi_token_depth"] = 0
    _set_default_arguments(parser, "model", gpt=gpt)
    _set_default_arguments(parser, "data", block_size=metadata.block_size)
    return initial


def apply_task_defaults(parser: ArgumentParser, task: str | None) -> None:
    """Set the parser's defaults for the arguments common to all tasks to the defaults of the given task.

    Otherwise, the parser would keep the defaults of the default task.

    Args:
        parser: Parser whose defaults are changed.
        task: Class name or import path of the task, or None for the default task.
    """
    kind = import_class(task or "LanguageModel", "lit_gpt_scratch.tasks")
    _set_default_arguments(parser, "model", **getattr(kind, "argument_defaults", {}))


def _set_default_arguments(parser: ArgumentParser, part: str, **arguments: Any) -> None:
    """Change the default arguments of the default ``model`` or ``data`` class.

    If a flag selects another class, the parser keeps the arguments that this class also accepts.
    """
    before = parser.get_default(part)
    parser.set_defaults(
        {part: {"class_path": before["class_path"], "init_args": {**before.get("init_args", {}), **arguments}}}
    )


def import_class(name: str, package: str) -> Any:
    """Import a class by its import path, or by name from ``package``; return None if it does not exist.

    Importing a class named by a flag executes its module, which the parser would do anyway.
    """
    try:
        return import_object(name if "." in name else f"{package}.{name}")
    except (ImportError, AttributeError, ValueError):
        return None


def class_defaults(part: Namespace, init_from: str | None = None) -> dict[str, Any]:
    """Return the values that a class uses for arguments left at ``None``, keyed by argument name.

    A class defines these values in a classmethod ``default_arguments(arguments)``, which receives the other arguments.
    The values cannot be defaults in the signature, because the parser keeps arguments of the same name when a flag
    changes the class: AdamW would inherit Muon's learning rate, for example, which is too high for AdamW.

    Args:
        part: Parsed config of the class, with ``class_path`` and ``init_args``.
        init_from: Value of ``model.init_from``.
    """
    kind = import_class(str(part.get("class_path", "")), "lit_gpt_scratch.optim")
    if not hasattr(kind, "default_arguments"):
        return {}
    defaults = kind.default_arguments({**(part.get("init_args") or {}), "init_from": init_from})
    return {name: value for name, value in defaults.items() if _accepts_none(kind, name)}


def _accepts_none(kind: type, argument: str) -> bool:
    """Return whether the default of a class argument is ``None``.

    A user-defined subclass may inherit ``default_arguments``, but declare a different default in its ``__init__``.
    """
    for base in kind.__mro__:
        parameters = inspect.signature(vars(base)["__init__"]).parameters if "__init__" in vars(base) else {}
        if argument in parameters:
            return parameters[argument].default is None
        if parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            return False
    return False


def _parts(config: Namespace) -> list[tuple[Namespace, dict[str, Any]]]:
    """Return (arguments, class defaults) pairs for the data module, the optimizer and the schedule."""
    found = []
    data, optimizer, schedule = map(config.get, ("data", "model.init_args.optimizer", "model.init_args.schedule"))
    init_from = config.get("model.init_args.init_from")
    if isinstance(data, Namespace) and isinstance(data.get("init_args"), Namespace):
        found.append((data.init_args, class_defaults(data, init_from)))
    if isinstance(optimizer, Namespace) and isinstance(optimizer.get("init_args"), Namespace):
        of_task = _task_class(config).optimizer_defaults.get(optimizer.class_path.rpartition(".")[2], {})
        found.append((optimizer.init_args, {**class_defaults(optimizer), **of_task}))
    if isinstance(schedule, Namespace):
        found.append((schedule, Schedule.default_arguments(vars(schedule))))
    return found


def _task_class(config: Namespace) -> type[GPTModule]:
    """Return the class of the task, or the base class if it is not one of this package's tasks."""
    kind = import_class(str(config.get("model.class_path")), "lit_gpt_scratch.tasks")
    return kind if inspect.isclass(kind) and issubclass(kind, GPTModule) else GPTModule


def unset_defaults(config: Namespace) -> None:
    """Set arguments that equal their class default to ``None``, as if they were missing from the config file."""
    for arguments, defaults in _parts(config):
        for name, value in defaults.items():
            if name in arguments and arguments[name] == value:
                arguments[name] = None
    trainer = config.get("trainer")
    if isinstance(trainer, Namespace):
        interval, epochs = trainer.get("val_check_interval"), trainer.get("check_val_every_n_epoch")
        if epochs == 1 and isinstance(interval, float):  # implied by a fraction of an epoch
            trainer.check_val_every_n_epoch = None
        elif interval == (VALIDATE_EVERY if epochs is None else 1.0):
            trainer.val_check_interval = None


def resolve_defaults(config: Namespace) -> None:
    """Set arguments that are ``None`` to the defaults that the run will use.

    ``compile``, ``max_logits_mb`` and ``vocab_size`` depend on the device and the data; ``resolve_built_defaults`` sets
    them later.
    """
    for arguments, defaults in _parts(config):
        for name, value in defaults.items():
            if name in arguments and arguments[name] is None and name != "vocab_size":
                arguments[name] = value
    trainer, default_epochs = config.trainer, _task_class(config).default_epochs
    if trainer.max_steps == -1 and trainer.max_epochs is None and trainer.max_time is None:
        trainer.max_epochs = default_epochs
        trainer.max_steps = MAX_STEPS if default_epochs is None else -1
    if trainer.precision is None:
        trainer.precision = default_precision(str(trainer.accelerator)).value
    if default_epochs is not None and trainer.val_check_interval is trainer.check_val_every_n_epoch is None:
        trainer.check_val_every_n_epoch = 1
    if trainer.val_check_interval is None:  # no validation interval in steps is set
        trainer.val_check_interval = VALIDATE_EVERY if trainer.check_val_every_n_epoch is None else 1.0
    if isinstance(trainer.val_check_interval, float) and trainer.check_val_every_n_epoch is None:
        trainer.check_val_every_n_epoch = 1  # a fraction of an epoch
    if trainer.log_every_n_steps is None:
        trainer.log_every_n_steps = 0 if trainer.barebones else LOG_EVERY
    if trainer.callbacks is not None:
        trainer.callbacks = _replace_string_enums(trainer.callbacks)
    switches = ("logger", "enable_checkpointing", "enable_progress_bar")
    for name, value in (TRAINER_DEFAULTS | dict.fromkeys(switches, not trainer.barebones)).items():
        if trainer[name] is None:
            trainer[name] = value


def restore_defaults_0_1(config: Namespace, saved: Mapping[str, Any]) -> None:
    """Set arguments that are ``null`` in the config of a version 0.1 run to the values that the run used.

    Args:
        config: Parsed config of the run.
        saved: The run's ``config.yaml`` as nested dictionaries, before conversion to a ``Namespace``.
    """
    for name, key in (("optimizer", "class_path"), ("schedule", "decay")):
        part, arguments = saved, config.get(f"model.init_args.{name}")
        for outer in ("model", "init_args", name):
            part = part.get(outer) if isinstance(part, Mapping) else None  # type: ignore[assignment]
        if not isinstance(part, Mapping) or not isinstance(arguments, Namespace):
            continue
        defaults = DEFAULTS_0_1.get(str(part.get(key)).rpartition(".")[2], {})
        part, arguments = part.get("init_args", part), arguments.get("init_args", arguments)
        for argument, value in defaults.items():
            if argument in part and part[argument] is None:
                arguments[argument] = value


def _replace_string_enums(value: Any) -> Any:
    """Replace string enum members, which YAML cannot represent, with strings, e.g. that of ``Timer.interval``."""
    if isinstance(value, Namespace):
        return Namespace(**{name: _replace_string_enums(each) for name, each in vars(value).items()})  # type: ignore[no-untyped-call]
    if isinstance(value, list):
        return [_replace_string_enums(each) for each in value]
    return value.value if isinstance(value, Enum) and isinstance(value, str) else value


def resolve_built_defaults(config: Namespace, device: torch.device, data: LightningDataModule) -> None:
    """Set the defaults that depend on the device and the prepared data: compilation, chunks of logits and vocabulary.

    If the training text is too small for the default vocabulary size, ``vocab_size`` stays ``None``: a size that is set
    explicitly raises an error if the text is too small for it.
    """
    if "model.init_args.compile" in config and config.model.init_args.compile is None:
        config.model.init_args.compile = "blocks" if explain_no_compile(device) is None else False
    if "model.init_args.max_logits_mb" in config and config.model.init_args.max_logits_mb is None:
        config.model.init_args.max_logits_mb = default_max_logits_mb(device)
    trained = "vocab_size" in class_defaults(config.data, config.get("model.init_args.init_from"))
    is_default = getattr(data, "vocab_size", None) == DEFAULT_VOCAB_SIZE
    if trained and is_default and config.data.init_args.vocab_size is None:
        config.data.init_args.vocab_size = DEFAULT_VOCAB_SIZE


def published_vocab_size(preset: str) -> int | None:
    """Return the vocabulary size of the published model that a preset is named after, or None if there is none."""
    return next((size for family, size in PUBLISHED_VOCABULARIES.items() if preset.startswith(family)), None)


def describe_presets() -> str:
    """Format a table of the presets with their shapes and parameter counts."""
    rows = [("preset", "layers", "heads", "width", "vocabulary", "parameters", "float32")]
    for name, gpt in PRESETS.items():
        vocabulary = published_vocab_size(name) or DEFAULT_VOCAB_SIZE
        with torch.device("meta"):  # shapes without memory
            n = sum(p.numel() for p in GPT(gpt, vocabulary, 1024).parameters())
        shape = f"{gpt.n_layer}", f"{gpt.n_head}", f"{gpt.n_embd}"
        rows.append((name, *shape, f"{vocabulary:,}", f"{n / 1e6:,.1f} M", f"{4 * n / 1e9:,.2f} GB"))
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{name:<{first}}  {'  '.join(map(str.rjust, cells, widths))}" for name, *cells in rows)
