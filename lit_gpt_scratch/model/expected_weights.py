"""Compute the names and shapes of a model's weights without allocating memory, to check a file before it is used."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.gpt import GPT
from lit_gpt_scratch.model.lora import ADAPTER_SUFFIXES, LoRA, add_lora, match_layers
from lit_gpt_scratch.model.output_heads import OutputHead, TokenHead

LAYER_INDEX: Final = re.compile(r"(?:^|\.)(\d+)\.")
"""Pattern that matches the layer index in a weight's name, in this package and in published models."""
FIRST_LAYER: Final = re.compile(r"(blocks|value_tables)\.0(?=\.)")
"""Pattern that matches the part of a weight's name that identifies the first layer."""
MAX_TABLE_BYTES: Final = 2**28
"""Maximum total size in bytes of the position tables, unless the weights in the file are larger. The tables are not in
the file, so a wrong context length could require any amount of memory."""


def expected_weights(
    found: Mapping[str, Tensor],
    config: GPTConfig,
    vocab_size: int,
    block_size: int,
    output_head: OutputHead = TokenHead(),  # noqa: B008 - frozen
    lora: LoRA | None = None,
) -> dict[str, Tensor]:
    """Return the state dict of a model on the meta device, i.e. names, shapes and dtypes without allocated memory.

    Only one block is built, and its weights are repeated for the other blocks, so that the time required does not
    depend on the sizes in the config, which may be wrong.

    Args:
        found: Weights in the file, under arbitrary names.
        config: Model config in the same file.
        vocab_size: Number of token ids.
        block_size: Context length in tokens.
        output_head: Output head.
        lora: LoRA settings, or None if the model has no adapters.

    Raises:
        UserError: The sizes in the config are too large for the weights, or the model cannot be built.
    """
    layers = {match[1] for name in found if (match := LAYER_INDEX.search(name))}
    if config.n_layer > len(layers):
        raise UserError(f"n_layer is {config.n_layer}, but there are weights for only {len(layers)} layers")
    try:
        with torch.device("meta"):
            net = GPT(config.resized(n_layer=1), vocab_size, block_size, output_head)
            linears = [] if lora is None else add_lora(net, replace(lora, pattern=""))
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # a tensor of this size cannot be created
        raise UserError(f"the model cannot be built ({str(error).splitlines()[0]})") from error
    state = net.state_dict()
    tables = sum(buffer.nbytes for name, buffer in net.named_buffers() if name not in state)
    if tables > max(MAX_TABLE_BYTES, sum(weight.nbytes for weight in found.values())):
        raise UserError(
            f"the context length is {block_size}, which requires position tables of {tables / 2**30:,.1f} GiB, more "
            "than the weights"
        )
    repeated = {each: weight for name, weight in state.items() for each in _repeat_name(name, config.n_layer)}
    if lora is None:
        return repeated
    names = [each for name in linears for each in _repeat_name(name, config.n_layer)]
    if not (adapted := match_layers(lora.pattern, names)):
        raise UserError(f"lora.pattern is {lora.pattern[:100]}, which does not match any linear layer")
    return {
        name: weight
        for name, weight in repeated.items()
        if not name.endswith(ADAPTER_SUFFIXES) or name.rpartition(".")[0] in adapted
    }


def _repeat_name(name: str, n_layer: int) -> list[str]:
    """Return a name's counterparts in all blocks if it belongs to the first block, otherwise only the name itself."""
    if not (first := FIRST_LAYER.match(name)):
        return [name]
    return [f"{first[1]}.{layer}{name[first.end() :]}" for layer in range(n_layer)]
