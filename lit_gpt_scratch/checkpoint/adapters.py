"""Adapters in a file of their own: several for one base, each a small part of its size."""

from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from lit_gpt_scratch.checkpoint.init_from import copy_weights
from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX, LoadedModel, load_checkpoint
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from lit_gpt_scratch.checkpoint.safetensors_export import compute_digest, export_safetensors, load_safetensors
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT, GPTConfig
from lit_gpt_scratch.model.lora import LoRA, add_lora, lora_state_dict, merge_lora, remove_lora

HEAD_WEIGHT = "head.weight"
ADAPTER_SUFFIXES = (".lora_a", ".lora_b")


def hash_base_weights(net: nn.Module, new_head: bool) -> str:
    """A hash of the weights that adapters rely on: all, but for the head where they come with one of their own."""
    return compute_digest(
        "", {name: w for name, w in net.state_dict().items() if not (new_head and name == HEAD_WEIGHT)}
    )


def save_adapter(checkpoint: Path, path: Path) -> None:
    """Write what a run with LoRA has trained, and no more; the tokenizer is the base's.

    Args:
        checkpoint: Of the run.
        path: The file to write; its name ends with ``.safetensors``.

    Raises:
        UserError: The checkpoint has no adapters, or they have no base, or the file cannot be written.
    """
    loaded = load_checkpoint(checkpoint)
    contents = CheckpointMetadata.from_checkpoint(loaded)
    if contents.lora is None:
        raise UserError(f"{checkpoint} has no adapters; a run with --model.lora.rank trains them")
    if contents.base is None:
        raise UserError(f"{checkpoint} began with no trained model (--model.init_from): its adapters have no base")
    trained = {
        name: weight
        for name, weight in loaded["state_dict"].items()
        if name.endswith(ADAPTER_SUFFIXES) or (contents.new_head and name == STATE_PREFIX + HEAD_WEIGHT)
    }
    export_safetensors(
        {METADATA_KEY: asdict(replace(contents, tokenizer="")), "state_dict": trained}, STATE_PREFIX, path
    )


def apply_adapter(base: LoadedModel, adapter: Path) -> LoadedModel:
    """A base with an adapter merged into its weights.

    Args:
        base: What the adapter was trained on.
        adapter: What ``save_adapter`` wrote.

    Raises:
        UserError: The file holds something else, or less, or an adapter for another base.
    """
    loaded = load_safetensors(adapter, "")
    contents = CheckpointMetadata.from_checkpoint(loaded)
    if contents.lora is None or contents.tokenizer:
        raise UserError(f"{adapter} holds no adapters, but a model of its own")
    if contents.base != hash_base_weights(base.net, contents.new_head):
        raise UserError(f"{adapter} is for another base: its adapters were trained beside other weights than these")
    net = GPT(GPTConfig(**contents.gpt), base.net.vocab_size, contents.block_size, contents.head)
    copy_weights(base, net)
    add_lora(net, LoRA(**contents.lora))
    if wrong := loaded["state_dict"].keys() ^ {*lora_state_dict(net), *([HEAD_WEIGHT] if contents.new_head else [])}:
        raise UserError(f"{adapter} is not whole, or has what is no adapter: {min(wrong)}; write it again")
    net.load_state_dict(loaded["state_dict"], strict=False)
    merge_lora(net)
    remove_lora(net)
    own = replace(contents, tokenizer=base.metadata.tokenizer, lora=None, base=None)
    return LoadedModel(net.eval(), base.tokenizer, own, base.step)
