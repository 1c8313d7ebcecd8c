"""Save LoRA adapters to a separate ``.safetensors`` file, and merge saved adapters into their base model."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from lit_gpt_scratch.checkpoint.init_from import copy_weights
from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX, LoadedModel, StoredModel, load_checkpoint
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from lit_gpt_scratch.checkpoint.safetensors_export import compute_digest, export_safetensors, load_safetensors
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_weights import validate_tensors
from lit_gpt_scratch.interop.model_family import HEAD
from lit_gpt_scratch.interop.tensor_stream import LazyTensors, on_meta
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.expected_weights import expected_weights
from lit_gpt_scratch.model.lora import ADAPTER_SUFFIXES, add_lora, merge_lora, remove_lora
from lit_gpt_scratch.trust import Trusted


def hash_base_weights(weights: Mapping[str, Tensor], new_head: bool) -> str:
    """Compute the SHA-256 of the base model weights that adapters were trained on, converted to float32.

    It is the same whatever the precision of training.

    Args:
        weights: State dict of the base model.
        new_head: Whether the head was trained together with the adapters. If True, the base model's head is not hashed.
    """
    hashed = {name: tensor for name, tensor in on_meta(weights).items() if not (new_head and name == HEAD)}
    return compute_digest("", LazyTensors(hashed, lambda name: weights[name].to(torch.float32)))


def save_adapter(checkpoint: Path, path: Path) -> None:
    """Save only the weights trained by a LoRA run: the adapters, and the head if it was trained as well.

    The tokenizer is not saved, since the base model contains it.

    Args:
        checkpoint: Path to the run's checkpoint.
        path: Path to the ``.safetensors`` file to write.

    Raises:
        UserError: The checkpoint has no adapters, the adapters have no base model, or the file cannot be written.
    """
    loaded = load_checkpoint(checkpoint)
    metadata = CheckpointMetadata.from_checkpoint(loaded)
    if metadata.lora is None:
        raise UserError(f"{checkpoint} has no adapters; train a model with --model.lora.rank")
    if metadata.base is None:
        raise UserError(
            f"{checkpoint} was trained without --model.init_from, "
            "so its adapters have no base model; export the complete model with to-safetensors"
        )
    trained = {
        name: weight
        for name, weight in loaded["state_dict"].items()
        if name.endswith(ADAPTER_SUFFIXES) or (metadata.new_head and name == STATE_PREFIX + HEAD)
    }
    adapter = {METADATA_KEY: asdict(replace(metadata, tokenizer="")), "state_dict": trained}
    export_safetensors(adapter, STATE_PREFIX, path)


def apply_adapter(base: LoadedModel, adapter: Path, trusted: Trusted = None) -> LoadedModel:
    """Merge an adapter into a copy of its base model.

    Args:
        base: The base model that the adapter was trained on.
        adapter: Path to a file written by ``save_adapter``.
        trusted: Import paths that the file may import, such as a custom attention class.

    Returns:
        The merged model; ``base`` is unchanged.

    Raises:
        UserError: The file contains no adapter, is incomplete, refers to code that is not trusted, or was trained on
            a different base model.
    """
    loaded = load_safetensors(adapter, "")
    metadata = CheckpointMetadata.from_checkpoint(loaded)
    if metadata.lora is None or metadata.tokenizer:
        raise UserError(
            f"{adapter} contains a complete model, not adapters; pass it as the checkpoint, without --adapter"
        )
    gpt, lora = metadata.build_configs(adapter, trusted)
    assert lora is not None
    if metadata.base != hash_base_weights(base.net.state_dict(), metadata.new_head):
        raise UserError(
            f"{adapter} was trained on the weights of a different base model; "
            "pass the checkpoint of the base model on which the adapter was trained"
        )
    weights, trained = dict(loaded["state_dict"]), base.net.state_dict()
    try:  # before memory is allocated, since the sizes in the metadata may be wrong
        expected = expected_weights(trained, gpt, base.net.vocab_size, metadata.block_size, metadata.head, lora)
    except UserError as error:
        raise UserError(f"{adapter} does not match its base model: {error}; export the adapter again") from error
    adapted = {name for name in expected if name.endswith(ADAPTER_SUFFIXES) or (metadata.new_head and name == HEAD)}
    if wrong := weights.keys() ^ adapted:
        raise UserError(f"{adapter} has missing or unexpected weights: {min(wrong)}; export the adapter again")
    validate_tensors({**trained, **weights}, expected, str(adapter))
    net = GPT(gpt, base.net.vocab_size, metadata.block_size, metadata.head)
    copy_weights(StoredModel(base.net.config, None, trained, base.metadata), net)
    add_lora(net, lora)
    net.load_state_dict(weights, strict=False)
    merge_lora(net)
    remove_lora(net)
    merged = replace(metadata, tokenizer=base.metadata.tokenizer, lora=None, base=None)
    return LoadedModel(net.eval(), base.tokenizer, merged, base.step)
