"""What a user reads of what libraries say: a mistake as one line that names the flag, and no more than helps."""

import logging
import re
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_gpt_scratch.errors import UserError


def silence_libraries() -> None:
    """Keep the console to what a user can act on."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # A class that what is validated on has no text of; the figure is that of the others.
    warnings.filterwarnings("ignore", message="No (positive|negative) samples (found|in) ", module="torchmetrics")
    # The policy that an alignment begins with, which nothing trains.
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training")
    # A memory map needs no loader processes.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # The position is the trainer's own progress, from which the order is computed.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    # FSDP2 of logits, which nothing changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor.*")
    # How many messages it takes to put a tensor together that is cut twice, and that gloo has no better one.
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    # A start that a policy is held to drops nothing.
    warnings.filterwarnings("ignore", message="Found .* in eval mode at the start of training.*")
    # Which is where a policy writes; the data module has no such hook.
    warnings.filterwarnings("ignore", message="You have overridden .on_after_batch_transfer. in .LightningModule.*")
    # Lightning 2.6 under torch 2.13.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what is the user's to mend into a ``UserError``; a bug passes through with its traceback.

    A parser that builds classes wraps their errors in its own, so the one to show is looked for inside.
    """
    try:
        yield
    except (ArgumentError, MisconfigurationException, ValueError, TypeError, AttributeError) as error:
        chain = list(_chain(error))
        ours = next((cause for cause in chain if isinstance(cause, UserError)), None)
        if ours is not None:
            if str(ours).startswith("Caught UserError in DataLoader worker"):  # with a traceback behind it
                ours = UserError(str(ours).rpartition("UserError: ")[2])
            raise ours from error
        if str(error) == "embedded null byte":  # what Python says of a path that no system can have
            raise UserError("a path in the flags or in a config holds a null byte") from error
        if isinstance(error, ArgumentError | MisconfigurationException) or _raised_by_a_library(error):
            raise UserError(_flag(chain) + _plain(str(chain[-1]), prefix=".".join(_keys(chain)))) from error
        raise


def _raised_by_a_library(error: BaseException) -> bool:
    """Whether the trainer or the parser refused a value, as they do for flags that contradict each other."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return where.startswith(("lightning.pytorch.", "jsonargparse."))


def _chain(error: BaseException) -> Iterator[BaseException]:
    inside: BaseException | None = error
    while inside is not None:
        yield inside
        inside = inside.__cause__ or inside.__context__


def _keys(chain: list[BaseException]) -> list[str]:
    """``model``, ``optimizer``, ``lr``: each level of the parser names its own part of the flag."""
    found = (re.match(r'Parser key "([^"]+)"', str(error)) for error in chain if isinstance(error, ArgumentError))
    keys = [match[1] for match in found if match]
    return [key for place, key in enumerate(keys) if key not in keys[:place]]  # a class in a list repeats them


def _flag(chain: list[BaseException]) -> str:
    keys = _keys(chain)
    return f"--{'.'.join(keys)}: " if keys else ""


def _plain(message: str, prefix: str) -> str:
    """Python's names of types in a user's words, and inner flags under their full name."""
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message)
    message = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", message)
    message = re.sub(r"Expected an? (.*?)\. Got value: ", r"expected \1, got ", message)
    message = re.sub(r"Expected a dot import path string: (.*)", r"there is no class \1 to choose", message)
    return message.replace("arguments: --", f"arguments: --{prefix}.") if prefix else message
