"""Weight initialization schemes.

Unless stated otherwise, biases are initialized to zero and the gains of normalization layers to one.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of the initial matrices and embeddings in GPT-2, Llama and Qwen."""


class ResidualBranch(NamedTuple):
    """Attention or feed-forward branch of a transformer block.

    Attributes:
        outputs: Linear layers whose outputs are added to the residual stream.
        norm: Normalization layer that is applied to these outputs before they are added to the residual stream, or None
            if ``norm_placement`` is not ``sandwich``.
    """

    outputs: list[nn.Linear]
    norm: nn.Module | None


class WeightsByRole(NamedTuple):
    """Weights of a network, grouped by their role in an initialization scheme.

    Attributes:
        embedding: Token embedding, of shape (vocab_size, n_embd).
        linears: All linear layers, including the head, in the order in which random weights are drawn.
        branches: Residual branches of all blocks, from the first block to the last.
        head: Linear layer of the output head.
        tied: Whether the weight of the head will be replaced with the weight of the embedding.
    """

    embedding: Tensor
    linears: list[nn.Linear]
    branches: list[ResidualBranch]
    head: nn.Linear
    tied: bool


def zero(weights: WeightsByRole) -> None:
    """Initialize the output layers of residual branches and the head to zero, as in modded-nanogpt, Fixup and muP.

    Each residual branch initially outputs zero; if a branch ends with a norm, the gain of the norm is initialized to
    zero instead of the output layer. If the head is not tied, the initial predictions are uniform and the initial loss
    is exactly ln(vocab_size), so that the model does not have to unlearn random predictions. Untied token embeddings
    have unit variance, so that they are not soon dominated by the outputs of the blocks.
    """
    nn.init.normal_(weights.embedding, std=INIT_STD if weights.tied else 1.0)  # a tied embedding is also the head
    for linear in weights.linears:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    for branch in weights.branches:
        # The gradient of a norm is very large at zero input, so the gain of the norm is initialized to zero instead.
        for layer in branch.outputs if branch.norm is None else [branch.norm]:
            nn.init.zeros_(layer.get_parameter("weight"))
    if not weights.tied:
        nn.init.zeros_(weights.head.weight)


def normal(weights: WeightsByRole) -> None:
    """Initialize all matrices and embeddings from a normal distribution, as in Llama and Qwen."""
    nn.init.normal_(weights.embedding, std=INIT_STD)
    for linear in weights.linears:
        nn.init.normal_(linear.weight, std=INIT_STD)


def gpt2(weights: WeightsByRole) -> None:
    """Initialize as in ``normal``, but scale down the output layers of residual branches, as in GPT-2.

    The standard deviation of these layers is divided by the square root of the number of branches.
    """
    normal(weights)
    for branch in weights.branches:
        for linear in branch.outputs:
            nn.init.normal_(linear.weight, std=INIT_STD / math.sqrt(len(weights.branches)))


def xavier(weights: WeightsByRole) -> None:
    """Apply Xavier uniform initialization (Glorot and Bengio 2010), as in the code of the original Transformer.

    Embeddings have unit variance, or variance 1 / n_embd if they are tied to the head.
    """
    for linear in weights.linears:
        nn.init.xavier_uniform_(linear.weight)
    nn.init.normal_(weights.embedding, std=weights.embedding.size(1) ** -0.5 if weights.tied else 1.0)


INITIALISATIONS: dict[str, Callable[[WeightsByRole], None]] = {
    "zero": zero, "gpt2": gpt2, "normal": normal, "xavier": xavier,
}  # fmt: skip
