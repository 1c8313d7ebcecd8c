"""Hide messages that users cannot act on, and report user errors as one line that names the flag."""

import logging
import re
import textwrap
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_gpt_scratch.cli.trainer_flags import find_component, name_flags
from lit_gpt_scratch.errors import UserError, exception_chain
from lit_gpt_scratch.terminal_output import escape_line, quote_short

log = logging.getLogger(__name__)

REQUESTED_OUTPUT: Final = frozenset({"callbacks", "profilers", "tuner"})
"""Lightning subpackages whose log messages a flag requests, such as a profiler's report."""
REQUESTED_MODES: Final = re.compile(r"barebones=True|detect_anomaly=True|fast_dev_run")
"""Pattern of messages about a mode that a flag has enabled; they are shown regardless of the module that logs them."""

MAX_LENGTH: Final = 1000
"""Maximum number of characters of a library's message, which may quote a config; the middle of it may be omitted."""


class RequestedOutput(logging.Handler):
    """Handler that prints Lightning's warnings and the output that a flag requests; other messages are hidden."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the record on to the handlers of this package, or drop it."""
        is_requested = not REQUESTED_OUTPUT.isdisjoint(Path(record.pathname).parts)
        if record.levelno >= logging.WARNING or is_requested or REQUESTED_MODES.search(record.getMessage()):
            log.handle(record)


def silence_libraries() -> None:
    """Hide library log messages and warnings that users cannot act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [RequestedOutput()], False
    # If a class has no validation examples, AUROC averages over the other classes.
    warnings.filterwarnings("ignore", message="No (positive|negative) samples (found|in) ", module="torchmetrics")
    # DPO, PPO and GRPO have a frozen reference policy.
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
    # Tokens are memory-mapped, so loading does not require worker processes.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # The sampler computes its position from the trainer's progress.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    # FSDP2 warns about the logits, which nothing modifies in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor.*")
    # Redistributing a doubly sharded tensor requires several collectives; gloo has no faster alternative.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    # PPO and GRPO generate in this hook of the LightningModule; the data module does not override it.
    warnings.filterwarnings("ignore", message="You have overridden .on_after_batch_transfer. in .LightningModule.*")
    # Lightning 2.6 causes this warning with torch 2.13.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


@contextmanager
def user_errors() -> Iterator[None]:
    """Convert errors caused by invalid flags or configs to ``UserError``; other exceptions keep their traceback.

    The whole chain of causes is searched for a ``UserError``, because the parser wraps errors from the classes that it
    instantiates, and because code that cleans up after an error may fail, for example if the disk is full.
    """
    try:
        yield
    except Exception as error:
        chain = list(exception_chain(error))
        ours = next((cause for cause in chain if isinstance(cause, UserError)), None)
        if ours is not None:
            if str(ours).startswith("Caught UserError in DataLoader worker"):  # followed by a traceback
                raise UserError(str(ours).rpartition("UserError: ")[2]) from error
            raise ours from ours.__cause__
        library_errors = (
            ArgumentError, MisconfigurationException, ValueError, TypeError, AttributeError, ImportError, RuntimeError,
            OverflowError,
        )  # fmt: skip
        if not isinstance(error, library_errors):
            raise
        if str(error) == "embedded null byte":  # Python's message for a path with a null byte
            raise UserError("a path in a flag or in a config contains a null byte; remove this byte") from error
        if isinstance(error, ArgumentError | MisconfigurationException) or _raised_by_a_library(error):
            flag = _flag(chain)
            components = filter(None, map(find_component, chain))
            component = next((found for found in components if found[1] != "NoneType"), None)
            if not flag and component:
                flag = f"--trainer.{' '.join(component)}: "
            raise UserError(flag + _plain(_reason(chain), prefix=".".join(parser_keys(chain)))) from error
        raise


def _raised_by_a_library(error: BaseException) -> bool:
    """Return whether Lightning's trainer or the parser raised the error, for example because of contradictory flags."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    if isinstance(error, RuntimeError):  # elsewhere it may be a bug
        return where.startswith("lightning.pytorch.callbacks.")
    return where.startswith(("lightning.pytorch.", "jsonargparse."))


def parser_keys(chain: Iterable[BaseException]) -> list[str]:
    """Return the components of a flag's name, one per nested parser, e.g. ``model``, ``optimizer`` and ``lr``."""
    found = (re.match(r'Parser key "([^"]+)"', str(error)) for error in chain if isinstance(error, ArgumentError))
    keys = [match[1] for match in found if match]
    return [key for place, key in enumerate(keys) if key not in keys[:place]]  # a class in a list repeats its key


def _flag(chain: list[BaseException]) -> str:
    keys = parser_keys(chain)
    return f"--{'.'.join(keys)}: " if keys else ""


def _reason(chain: list[BaseException]) -> str:
    """Return the message of the innermost error.

    For a flag that accepts a list or a class, the innermost error concerns only the list, which the parser tries
    first. In this case, return the error message for the class.
    """
    reason = str(chain[-1])
    missing = r"Problem with given class_path '(.*)':\n\s*No module named '([\w.]+)'"
    if found := next((match for error in chain if (match := re.search(missing, str(error)))), None):
        return (
            f"class {found[1]} not found, because there is no module {found[2]}; install it, or use the name or import "
            "path of another class"
        )
    if not reason.startswith("Expected a <class 'list'>"):
        return reason
    for error in chain:
        errors = str(error).partition("Errors:\n")[2].partition("\nGiven value type:")[0]
        items = re.split(r"^- ", textwrap.dedent(errors), flags=re.MULTILINE)[1:]
        of_class = [item for item in items if not item.startswith("Expected a <class")]
        if of_class:
            return " ".join(re.sub(r"Problem with given class_path .*:\n", "", of_class[0]).split())
    return reason


def _plain(message: str, prefix: str) -> str:
    """Replace Python type notation with plain words, and prepend ``prefix`` to the names of nested flags."""
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message)
    message = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", message)
    message = re.sub(r"Expected an? (.*?)\. Got value: ", r"expected \1, got ", message)
    message = re.sub(
        r"Expected a dot import path string: (.*)",
        r"class \1 not found; use the name of a class or its import path",
        message,
    )
    message = re.sub(
        r"the following arguments are required: ([\w, ]+)",
        lambda match: "required; set " + ", ".join(f"--{prefix}.{name}" for name in match[1].split(", ")),
        message,
    )
    message = re.sub(
        r"Not a valid subclass of (\w+)\. Got value: (.*?)\nSubclass types expect one of:.*",
        lambda match: (
            f"expected the name of a {match[1]}, or a mapping of class_path and init_args, got {quote_short(match[2])}"
        ),
        message,
        flags=re.DOTALL,
    )
    message = name_flags(message)
    message = message.replace("arguments: --", f"arguments: --{prefix}.") if prefix else message
    line = escape_line(" ".join(message.split()))
    return line if len(line) <= MAX_LENGTH else f"{line[: MAX_LENGTH // 2]} ... {line[-MAX_LENGTH // 2 :]}"
