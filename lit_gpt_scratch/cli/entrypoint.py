"""Setup, error handling and argument parsing shared by all commands.

This module imports no heavy modules, so that commands without a trainer start quickly.
"""

import argparse
import logging
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from tqdm.contrib.logging import logging_redirect_tqdm

from lit_gpt_scratch.errors import UserError, describe_environment_error, exception_chain
from lit_gpt_scratch.terminal_output import EscapingFormatter, escape_line, output_streams, redact

if TYPE_CHECKING:
    from lit_gpt_scratch.checkpoint.loading import LoadedModel
    from lit_gpt_scratch.model import GPT
    from lit_gpt_scratch.text.tokenizer import Tokenizer


TRUST: Final[dict[str, Any]] = {
    "metavar": "CLASS", "action": "append",
    "help": "import path of a custom class that the checkpoint or adapter may import; may be repeated",
}  # fmt: skip
"""Keyword arguments of ``add_argument`` for ``--trust``."""
PRECISIONS = {"32-true": "float32", "bf16-true": "bfloat16"}
"""Dtypes that inference supports, keyed by Lightning's precision name."""
MAX_ERROR_LENGTH = 2000
"""Maximum number of characters in an error message; the middle of a longer message is omitted."""


def run_command(name: str) -> None:
    """Import and run a command with the arguments in ``sys.argv``, after replacing the output streams."""
    run(lambda: import_module(f"lit_gpt_scratch.cli.{name}").main())


def run(main: Callable[[], None]) -> None:
    """Run the ``main`` of a command; print a ``UserError`` as one line on standard error, and exit with code 2.

    An environment error, such as a full disk, is reported in the same way.
    """
    with output_streams():
        handler = logging.StreamHandler()  # to standard error
        handler.setFormatter(EscapingFormatter("%(message)s"))
        logger = logging.getLogger("lit_gpt_scratch")
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        try:
            with logging_redirect_tqdm([logger]):  # print log lines above progress bars
                _run_and_flush(main)
        except Exception as error:
            mistake = next((cause for cause in exception_chain(error) if isinstance(cause, UserError)), None)
            description = describe_environment_error(error) if mistake is None else str(mistake)
            if description is None:
                raise
            _exit_with_error(description)
        finally:
            logger.removeHandler(handler)


def _run_and_flush(main: Callable[[], None]) -> None:
    """Run ``main``, then flush standard output, so that an error in writing buffered text is raised here."""
    try:
        main()
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def _exit_with_error(message: str) -> NoReturn:
    line = escape_line(redact(" ".join(message.split())))
    if len(line) > MAX_ERROR_LENGTH:
        line = f"{line[: MAX_ERROR_LENGTH // 2]} ... {line[-MAX_ERROR_LENGTH // 2 :]}"
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()
    sys.exit(2)


class DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that appends the default of each argument, unless the default is None, False or empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_off = action.default is None or action.default is False or action.default == []
        return action.help if is_off else super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """Argument parser that raises ``UserError`` for invalid arguments; used by commands that need no trainer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=DefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise ``UserError`` instead of printing the usage and exiting."""
        raise UserError(f"{message} (see --help)")

    def add_checkpoint_arguments(self) -> None:
        """Add the arguments that specify which model to load, and on which device to run it."""
        self.add_argument(
            "checkpoint", metavar="CKPT", nargs="?", help="checkpoint file or run folder (default: the newest run)"
        )
        self.add_argument("--runs", type=Path, default=Path("runs"), help="folder that contains all runs")
        self.add_argument("--experiment", help="without CKPT: load the newest run of this experiment")
        self.add_argument(
            "--device", default="auto", help="device: cpu, cuda, cuda:N, mps, or auto (a GPU if available)"
        )
        self.add_argument("--precision", default="32-true", choices=PRECISIONS, help="dtype of the weights")
        self.add_argument(
            "--adapter", metavar="FILE", type=Path, help="LoRA adapter file to apply, exported by convert to-adapter"
        )
        self.add_argument("--trust", **TRUST)


def validate_utf8(given: argparse.Namespace, *names: str) -> None:
    """Check that the values of the named flags are valid UTF-8, the only encoding that tokenizers accept.

    Raises:
        UserError: A value is not valid UTF-8.
    """
    for name in names:
        value = getattr(given, name, None)
        for text in [value] if isinstance(value, str) else value or ():
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"argument --{name}: the text is not valid UTF-8; pass text encoded as UTF-8")


def load_language_model(given: argparse.Namespace) -> "tuple[GPT, Tokenizer]":
    """Load the language model specified by the flags from ``add_checkpoint_arguments``, and its tokenizer.

    Raises:
        UserError: The model or device is not available, or the model is not a language model.
    """
    return load_trained_model(given).require_language_model()


def load_trained_model(given: argparse.Namespace) -> "LoadedModel":
    """Load a model for any task onto a device, both specified by the flags from ``add_checkpoint_arguments``.

    Raises:
        UserError: The checkpoint or device is not available.
    """
    import torch

    from lit_gpt_scratch.checkpoint.adapters import apply_adapter
    from lit_gpt_scratch.checkpoint.loading import build_model, load_checkpoint
    from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
    from lit_gpt_scratch.distributed.hardware_defaults import configure_process

    configure_process()
    path = find_checkpoint(given.checkpoint, given.runs, given.experiment)
    trained = build_model(load_checkpoint(path), path, given.trust)
    if given.adapter is not None:
        trained = apply_adapter(trained, given.adapter, given.trust)
    device = find_device(given.device)
    try:
        trained.net.to(device, getattr(torch, PRECISIONS[given.precision]))
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"argument --device: cannot use {device} ({str(error).splitlines()[0]}); choose another device"
        ) from error
    return trained


def find_device(name: str) -> str:
    """Return the device for a value of ``--device``; ``auto`` selects a GPU if available, and the CPU otherwise.

    Raises:
        UserError: The device is unknown or not available on this machine.
    """
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name):
        raise UserError(f"argument --device: {name} is not valid; use one of auto, cpu, cuda, cuda:N, mps")
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((kind for kind, available in gpus.items() if available), "cpu")
    if not gpus.get(name.partition(":")[0], True):
        raise UserError(f"argument --device: {name} is not available on this machine; use auto or cpu")
    return name
