"""Names and shapes of a model's weights, computed without allocating memory, to check a file before it is used."""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.gpt import GPT
from lit_gpt_scratch.model.lora import LoRA, add_lora
from lit_gpt_scratch.model.output_heads import OutputHead, TokenHead

MAX_TABLE_BYTES: Final = 2**28
"""Maximum size in bytes of position tables that are larger than the model's weights. The tables are not in the file, so
a wrong context length could require any amount of memory."""


def expected_weights(
    found: Mapping[str, Tensor],
    config: GPTConfig,
    vocab_size: int,
    block_size: int,
    output_head: OutputHead = TokenHead(),  # noqa: B008 - frozen
    lora: LoRA | None = None,
) -> dict[str, Tensor]:
    """Return the state dict of a model on the meta device, i.e. names, shapes and dtypes without allocated memory.

    The time and memory required depend on the number of tensors in ``found``, not on the sizes in the config, which may
    be wrong.

    Args:
        found: Weights that a file contains, with any names.
        config: Config in the same file.
        vocab_size: Number of token ids.
        block_size: Context length in tokens.
        output_head: Output head.
        lora: LoRA settings; None without adapters.

    Raises:
        UserError: The sizes are too large for the weights, or the model cannot be built.
    """
    if config.n_layer > len(found):
        raise UserError(f"n_layer is {config.n_layer}, but there are only {len(found)} tensors")
    try:
        with torch.device("meta"):
            net = GPT(config, vocab_size, block_size, output_head)
            if lora is not None:
                add_lora(net, lora)
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
    return state
