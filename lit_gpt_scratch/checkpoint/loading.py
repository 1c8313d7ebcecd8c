"""A checkpoint, or whatever else a trained model lies in, back to something that can be used."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from lit_gpt_scratch.checkpoint.checkpoint_io import verify_checksum
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from lit_gpt_scratch.checkpoint.run_folder import find_checkpoint
from lit_gpt_scratch.checkpoint.safetensors_export import SAFETENSORS_SUFFIX, load_safetensors
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop import hf_checkpoint
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.lora import LoRA, add_lora, merge_lora, remove_lora
from lit_gpt_scratch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

STATE_PREFIX: Final = "net."
"""Prefix of the network's weights in a task's state."""


class LoadedModel(NamedTuple):
    """A trained model.

    Attributes:
        net: The network, ready to use; adapters are merged into its weights.
        tokenizer: What makes its ids.
        metadata: What its checkpoint says of it.
        step: After which optimizer step it was saved; 0 where nobody knows.
    """

    net: GPT
    tokenizer: Tokenizer
    metadata: CheckpointMetadata
    step: int = 0

    def require_language_model(self) -> tuple[GPT, Tokenizer]:
        """The first two, of a model that can write.

        Raises:
            UserError: Its head reads something else than tokens.
        """
        if self.metadata.non_lm_task is not None:
            raise UserError(f"the model is no language model: it {self.metadata.non_lm_task}, and writes nothing")
        return self.net, self.tokenizer


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint, a shared model or a folder of Hugging Face's, on the CPU; no code is run.

    Raises:
        UserError: It is missing, was altered, or is something else.
    """
    if (path / hf_checkpoint.CONFIG_FILE).is_file():
        return load_hf_checkpoint(path)
    if path.suffix == SAFETENSORS_SUFFIX:
        return load_safetensors(path, STATE_PREFIX)
    if not verify_checksum(path):
        log.warning("%s has no seal, as when something else wrote it: whether it was altered since, nobody knows", path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # reading a file that is something else can end in any of them
        raise UserError(f"{path} is not a checkpoint, or is damaged") from error
    if not isinstance(loaded, dict) or not {METADATA_KEY, "state_dict"} <= loaded.keys():
        raise UserError(f"{path} is not a checkpoint of lit_gpt_scratch")
    return loaded


def load_hf_checkpoint(path: Path) -> dict[str, Any]:
    """A folder of Hugging Face's, in the form of a checkpoint without optimizer and counters.

    Raises:
        UserError: It is missing, or holds no model that this package can compute.
    """
    (gpt, vocab_size, block_size), weights, tokenizer = hf_checkpoint.read_hf_checkpoint(path)
    contents = CheckpointMetadata(asdict(gpt), vocab_size, block_size, tokenizer.to_json(), tokenizer.start_of_text)
    return {METADATA_KEY: asdict(contents), "state_dict": {STATE_PREFIX + name: weights[name] for name in weights}}


def build_model(checkpoint: dict[str, Any], path: Path, trusted: str | None = None) -> LoadedModel:
    """The model of what ``load_checkpoint`` gave.

    Args:
        checkpoint: What it gave.
        path: Where that came from.
        trusted: The attention class of somebody's own that it may name: to build it is to run that code.

    Raises:
        UserError: It names a class that is not trusted, or its parts do not fit together.
    """
    contents = CheckpointMetadata.from_checkpoint(checkpoint)
    if not contents.tokenizer:
        raise UserError(f"{path} holds adapters alone; name what they are for, and this file as --adapter")
    if (own := contents.gpt.get("attention")) not in (None, trusted):
        raise UserError(f"{path} has attention of its own, {own}; if you trust that code, let it run: --trust {own}")
    weights = {
        name.removeprefix(STATE_PREFIX): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith(STATE_PREFIX)
    }
    try:
        net = GPT(GPTConfig(**contents.gpt), contents.vocab_size, contents.block_size, contents.head)
        if contents.lora is not None:
            add_lora(net, LoRA(**contents.lora))
        net.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{path} holds a model that this version cannot build ({error})") from error
    if contents.lora is not None:
        merge_lora(net)
        remove_lora(net)
    tokenizer = Tokenizer.from_json(contents.tokenizer, contents.start_of_text)
    return LoadedModel(net.eval(), tokenizer, contents, checkpoint.get("global_step", 0))


def load_model(path: Path, trusted: str | None = None) -> tuple[GPT, Tokenizer]:
    """A language model, ready to use, and its tokenizer.

    Args:
        path: A checkpoint, a shared model, or a folder of Hugging Face's.
        trusted: As for ``build_model``.

    Raises:
        UserError: It is missing, is something else, names a class that is not trusted, its parts do not fit together,
            or it reads something else than tokens.
    """
    return build_model(load_checkpoint(path), path, trusted).require_language_model()


def load_reward_model(place: str, tokenizer_json: str, trusted: str | None = None) -> GPT:
    """A network whose head is a ``ScalarHead``, in evaluation mode and frozen; ``model.heads.rewards`` asks it.

    Args:
        place: A run folder, a checkpoint or a ``.safetensors`` file.
        tokenizer_json: The policy's tokenizer.
        trusted: The attention class of somebody's own that it may name: to build it is to run that code.

    Raises:
        UserError: There is none, or it is no reward model, or its tokens are not those of the policy.
    """
    path = find_checkpoint(place, Path(), None)
    trained = build_model(load_checkpoint(path), path, trusted)
    if not trained.metadata.rewards:
        what = trained.metadata.non_lm_task or "predicts tokens"
        raise UserError(f"{path} is no reward model: it {what}; fit --model Reward trains one")
    if trained.metadata.tokenizer != tokenizer_json:
        raise UserError(
            f"the reward model {path} was trained with another tokenizer than the policy has: begin both with the same "
            "model (--model.init_from)"
        )
    return trained.net.requires_grad_(False)
