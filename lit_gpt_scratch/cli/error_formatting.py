"""Console output: hide messages that users cannot act on, and report user errors as one line that names the flag."""

import logging
import re
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_gpt_scratch.errors import UserError, exception_chain


def silence_libraries() -> None:
    """Hide library log messages and warnings that users cannot act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
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
                ours = UserError(str(ours).rpartition("UserError: ")[2])
            raise ours from error
        if not isinstance(error, ArgumentError | MisconfigurationException | ValueError | TypeError | AttributeError):
            raise
        if str(error) == "embedded null byte":  # Python's message for a path with a null byte
            raise UserError("a path in a flag or in a config contains a null byte; remove this byte") from error
        if isinstance(error, ArgumentError | MisconfigurationException) or _raised_by_a_library(error):
            raise UserError(_flag(chain) + _plain(str(chain[-1]), prefix=".".join(_keys(chain)))) from error
        raise


def _raised_by_a_library(error: BaseException) -> bool:
    """Return whether Lightning's trainer or the parser raised the error, for example because of contradictory flags."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return where.startswith(("lightning.pytorch.", "jsonargparse."))


def _keys(chain: list[BaseException]) -> list[str]:
    """Return the parts of a flag's name, one for each nested parser, such as ``model``, ``optimizer`` and ``lr``."""
    found = (re.match(r'Parser key "([^"]+)"', str(error)) for error in chain if isinstance(error, ArgumentError))
    keys = [match[1] for match in found if match]
    return [key for place, key in enumerate(keys) if key not in keys[:place]]  # a class in a list repeats its key


def _flag(chain: list[BaseException]) -> str:
    keys = _keys(chain)
    return f"--{'.'.join(keys)}: " if keys else ""


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
    return message.replace("arguments: --", f"arguments: --{prefix}.") if prefix else message
