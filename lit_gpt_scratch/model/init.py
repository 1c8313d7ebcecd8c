"""How weights are drawn, by the name of the scheme. In all of them biases begin at zero, and gains at one."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from lit_gpt_scratch.model.gpt import GPT, Block

INIT_STD = 0.02
"""Standard deviation that GPT-2, Llama and Qwen draw their matrices and tables with."""


def zero(net: "GPT") -> None:
    """Whatever writes to the residual stream or to the logits starts at zero.

    Blocks then begin as the identity and the loss as exactly ln(vocab_size), where the head is not tied: the model
    starts from "I know nothing" instead of unlearning a random opinion (muP and Fixup style, as in modded-nanogpt).
    Token embeddings have unit variance, so that what the blocks learn to add does not soon drown them.
    """
    tied = net.config.tied_embeddings
    nn.init.normal_(net.embedding.weight, std=INIT_STD if tied else 1.0)  # a tied table is also the head's
    for linear in _linears(net):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    for block in _blocks(net):
        for part, end in ((block.attention, block.attention_end), (block.feed_forward, block.feed_forward_end)):
            # A zero before a norm would have a gradient of one by the norm's eps: there the gain is the zero.
            nn.init.zeros_(part.output.weight if isinstance(end, nn.Identity) else end.get_parameter("weight"))
    if not tied:
        nn.init.zeros_(net.head.weight)


def normal(net: "GPT") -> None:
    """Every matrix and table from one normal distribution (Llama, Qwen)."""
    nn.init.normal_(net.embedding.weight, std=INIT_STD)
    for linear in _linears(net):
        nn.init.normal_(linear.weight, std=INIT_STD)


def gpt2(net: "GPT") -> None:
    """The same, but what writes to the stream is smaller by the root of the number of its writers (GPT-2)."""
    normal(net)
    for block in _blocks(net):
        for part in (block.attention, block.feed_forward):
            nn.init.normal_(part.output.weight, std=INIT_STD / math.sqrt(2 * net.config.n_layer))


def xavier(net: "GPT") -> None:
    """Matrices uniform by the sum of their sizes (Glorot and Bengio 2010), as in the original Transformer's code.

    Its embeddings have unit variance where the blocks read them, and that of the width's inverse where the head does.
    """
    for linear in _linears(net):
        nn.init.xavier_uniform_(linear.weight)
    nn.init.normal_(net.embedding.weight, std=net.config.n_embd**-0.5 if net.config.tied_embeddings else 1.0)


INITIALISATIONS: dict[str, Callable[["GPT"], None]] = {"zero": zero, "gpt2": gpt2, "normal": normal, "xavier": xavier}


@torch.no_grad()
def initialise_weights(net: "GPT") -> None:
    """Draw all weights as ``config.initialisation`` says; what a switch adds to the stream begins at zero."""
    for linear in _linears(net):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    for table in net.position.modules():
        if isinstance(table, nn.Embedding):
            nn.init.normal_(table.weight, std=INIT_STD)  # GPT-2's
    for values in net.value_tables.parameters():
        nn.init.zeros_(values)
    INITIALISATIONS[net.config.initialisation](net)


def _blocks(net: "GPT") -> list["Block"]:
    return cast("list[Block]", list(net.blocks))


def _linears(net: nn.Module) -> list[nn.Linear]:
    return [module for module in net.modules() if isinstance(module, nn.Linear)]
