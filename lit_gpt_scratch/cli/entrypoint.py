"""How every door opens and closes. Imports nothing heavy: doors without a trainer start quickly."""

import argparse
import io
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from lit_gpt_scratch.errors import UserError

if TYPE_CHECKING:
    from lit_gpt_scratch.checkpoint.loading import LoadedModel
    from lit_gpt_scratch.model import GPT
    from lit_gpt_scratch.text.tokenizer import Tokenizer


PRECISIONS = {"32-true": "float32", "bf16-true": "bfloat16"}
"""Lightning's names for the types that a model can be used in."""


def run(door: Callable[[], None]) -> None:
    """Run a door; a ``UserError`` becomes one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a redirected stream may know fewer characters than a model
            stream.reconfigure(encoding="utf-8", errors="replace")
    handler = TqdmLoggingHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("lit_gpt_scratch")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    try:
        door()
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except BrokenPipeError:  # the reader of standard output has seen enough, as in `generate | head -1`
        sys.stderr.close()
        sys.exit(1)


class TqdmLoggingHandler(logging.Handler):
    """Write log lines to standard error, above a progress bar, where there is one, instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Let the bar make way for the line."""
        tqdm.write(self.format(record), file=sys.stderr)


class CommandParser(argparse.ArgumentParser):
    """Flags of a door that needs no trainer: a mistake is a ``UserError`` like any other."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Argparse would print its usage, several lines of it, before the message."""
        raise UserError(f"{message} (see --help)")

    def add_checkpoint(self) -> None:
        """The flags by which a door finds the model it works with."""
        self.add_argument(
            "checkpoint",
            metavar="CKPT",
            nargs="?",
            help="a checkpoint file or a run folder; without it, the newest run",
        )
        self.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs")
        self.add_argument("--experiment", help="look for the newest run in this experiment only")
        self.add_argument("--device", default="cpu", help="cpu, cuda or mps")
        self.add_argument("--precision", default="32-true", choices=PRECISIONS, help="type of the weights")
        self.add_argument("--adapter", metavar="FILE", type=Path, help="beside its weights; see convert to-adapter")
        self.add_argument("--trust", metavar="CLASS", help="let a checkpoint run this attention class of your own")


def validate_utf8(given: argparse.Namespace, *names: str) -> None:
    """Refuse flags whose bytes were no UTF-8: no tokenizer reads them.

    Raises:
        UserError: One of them is not.
    """
    for name in names:
        value = getattr(given, name, None)
        for text in [value] if isinstance(value, str) else value or ():
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UserError(f"argument --{name}: it is not UTF-8 text")


def load_language_model(given: argparse.Namespace) -> "tuple[GPT, Tokenizer]":
    """The language model that ``add_checkpoint``'s flags mean, on the device they name, and its tokenizer.

    Raises:
        UserError: There is no such model, or no such device.
    """
    return load_trained_model(given).require_language_model()


def load_trained_model(given: argparse.Namespace) -> "LoadedModel":
    """Whatever model ``add_checkpoint``'s flags mean, on the device they name.

    Raises:
        UserError: There is no such checkpoint, or no such device.
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
        trained = apply_adapter(trained, given.adapter)
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", given.device):
        raise UserError(f"argument --device: {given.device} is none of cpu, cuda, cuda:N, mps")
    try:
        trained.net.to(given.device, getattr(torch, PRECISIONS[given.precision]))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"argument --device: cannot use {given.device} ({reason})") from error
    return trained
