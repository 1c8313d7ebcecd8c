"""A checkpoint file back to a model that can be used."""

import logging
from pathlib import Path
from typing import Any, Final

import torch

from lit_gpt_scratch.checkpoint.contents import KEY, Contents
from lit_gpt_scratch.checkpoint.sealed import refuse_altered
from lit_gpt_scratch.checkpoint.sharing import SUFFIX, load_shared
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

NETWORK: Final = "net."
"""Prefix of the network's weights in a task's state."""


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint or a shared model, on the CPU; plain data and tensors only, no code is run.

    Raises:
        UserError: The file is missing, was altered, or is not a checkpoint.
    """
    if path.suffix == SUFFIX:
        return load_shared(path, NETWORK)
    if not refuse_altered(path):
        log.warning("%s has no seal, as when something else wrote it: whether it was altered since, nobody knows", path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # reading a file that is something else can end in any of them
        raise UserError(f"{path} is not a checkpoint, or is damaged") from error
    if not isinstance(loaded, dict) or not {KEY, "state_dict"} <= loaded.keys():
        raise UserError(f"{path} is not a checkpoint of lit_gpt_scratch")
    return loaded


def load_model(path: Path, trusted: str | None = None) -> tuple[GPT, Tokenizer]:
    """The network, ready to use, and its tokenizer.

    Args:
        path: A checkpoint or a shared model.
        trusted: The attention class of somebody's own that it may name: to build it is to run that code.

    Raises:
        UserError: The file is missing, is not a checkpoint, names a class that is not trusted, or its parts do not fit
            together.
    """
    checkpoint = load_checkpoint(path)
    contents = Contents.of(checkpoint)
    if (own := contents.gpt.get("attention")) not in (None, trusted):
        raise UserError(f"{path} has attention of its own, {own}; if you trust that code, let it run: --trust {own}")
    weights = {
        name.removeprefix(NETWORK): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith(NETWORK)
    }
    try:
        model = GPT(GPTConfig(**contents.gpt), contents.vocab_size, contents.block_size)
        model.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{path} holds a model that this version cannot build ({error})") from error
    return model.eval(), Tokenizer.from_json(contents.tokenizer, contents.start_of_text)
