"""Average the weights of several checkpoints of the same architecture (model soups, https://arxiv.org/abs/2203.05482)."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt_scratch.checkpoint.adapters import hash_base_weights
from lit_gpt_scratch.checkpoint.loading import STATE_PREFIX, StoredModel, load_lazily, merge_adapters, open_model
from lit_gpt_scratch.checkpoint.metadata import METADATA_KEY, TRAINING_SETTINGS, MergeSource
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.tensor_stream import LazyTensors, add_prefix, on_meta
from lit_gpt_scratch.trust import Trusted


def merge_checkpoints(paths: Sequence[Path], weights: Sequence[float], trusted: Trusted = None) -> dict[str, Any]:
    """Average checkpoints. LoRA adapters are first merged into the weights of their checkpoints.

    The average of each tensor is computed in float64 when it is accessed, so that only one tensor of each checkpoint is
    in memory. It has the widest data type of the averaged tensors. The average of equal tensors is equal to them.

    Args:
        paths: Paths to checkpoints, ``.safetensors`` files or Hugging Face folders.
        weights: Positive weight of each checkpoint in the average; they are divided by their sum.
        trusted: Import paths that the checkpoints may import, such as a custom attention class.

    Returns:
        Checkpoint dict with the metadata of the first checkpoint, and with the digests and weights of all checkpoints.

    Raises:
        UserError: A checkpoint cannot be read, or has another architecture or tokenizer than the first one.
    """
    models = [merge_adapters(open_model(load_lazily(path), path, trusted)) for path in paths]
    for path, model in zip(paths[1:], models[1:], strict=True):
        _require_mergeable(models[0], paths[0], model, path)
    shares = [weight / sum(weights) for weight in weights]
    shapes = [on_meta(model.weights) for model in models]
    merged = {
        name: tensor.to("meta", reduce(torch.promote_types, (each[name].dtype for each in shapes)))
        for name, tensor in shapes[0].items()
    }
    averages = LazyTensors(merged, lambda name: _average([m.weights[name] for m in models], shares, merged[name].dtype))
    sources = [
        MergeSource(hash_base_weights(model.weights, new_head=False), share)
        for model, share in zip(models, shares, strict=True)
    ]
    metadata = replace(models[0].metadata, lora=None, base=None, new_head=False, merged_from=sources)
    return {METADATA_KEY: asdict(metadata), "state_dict": add_prefix(averages, STATE_PREFIX)}


def _average(tensors: Sequence[Tensor], shares: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the weighted average of tensors of the same shape, as the first plus the average difference from it."""
    first = tensors[0].double()
    difference = torch.zeros_like(first)
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        difference += share * (tensor.double() - first)
    return torch.where(difference == 0, first, first + difference).to(dtype)  # -0.0 + 0.0 would be 0.0


def _require_mergeable(first: StoredModel, first_path: Path, other: StoredModel, path: Path) -> None:
    """Check that two models have the same architecture, output head and tokenizer.

    Raises:
        UserError: They differ; the message names all differences.
    """
    here, there = (replace(model.metadata, lora=None).fields for model in (other, first))
    different = [
        f"{name} is {here.get(name)}, not {there.get(name)}"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name) and name not in TRAINING_SETTINGS
    ]
    if any(getattr(first.metadata, name) != getattr(other.metadata, name) for name in ("tokenizer", "start_of_text")):
        different.append("the tokenizers differ")
    if different:
        raise UserError(
            f"{path} cannot be merged with {first_path}: {'; '.join(different)}; merge checkpoints of one architecture "
            "and tokenizer"
        )
