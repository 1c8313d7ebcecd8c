"""Weight initialisation schemes by name. In all of them biases start at zero, and the gains of norms at one."""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

INIT_STD = 0.02
"""Standard deviation of matrices and embeddings in GPT-2, Llama and Qwen."""


class ResidualBranch(NamedTuple):
    """The attention or feed-forward branch of a block.

    Attributes:
        outputs: Linear layers whose outputs are added to the residual stream.
        norm: Norm between them and the residual stream, if the block has one (``norm_placement: sandwich``).
    """

    outputs: list[nn.Linear]
    norm: nn.Module | None


class WeightsByRole(NamedTuple):
    """A network's weights as an initialisation scheme sees them.

    Attributes:
        embedding: Token embedding, (vocab_size, n_embd).
        linears: All linear layers including the head, in module order, which is the order of the random draws.
        branches: Residual branches of all blocks, in order.
        head: The output head's linear layer.
        tied: Whether the head shares the embedding's weight, which then replaces its own.
    """

    embedding: Tensor
    linears: list[nn.Linear]
    branches: list[ResidualBranch]
    head: nn.Linear
    tied: bool


def zero(weights: WeightsByRole) -> None:
    """Outputs to the residual stream and to the logits start at zero (muP and Fixup style, as in modded-nanogpt).

    Blocks start as the identity, and the loss as exactly ln(vocab_size) where the head is not tied: the model starts
    from the uniform distribution instead of having to unlearn random predictions. Token embeddings have unit variance,
    so that the outputs of the blocks do not soon dominate them.
    """
    nn.init.normal_(weights.embedding, std=INIT_STD if weights.tied else 1.0)  # a tied embedding is also the head's
    for linear in weights.linears:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    for branch in weights.branches:
        # The gradient of a norm at zero input is one by eps, so before a norm it is the norm's gain that is zero.
        for layer in branch.outputs if branch.norm is None else [branch.norm]:
            nn.init.zeros_(layer.get_parameter("weight"))
    if not weights.tied:
        nn.init.zeros_(weights.head.weight)


def normal(weights: WeightsByRole) -> None:
    """All matrices and embeddings from one normal distribution (Llama, Qwen)."""
    nn.init.normal_(weights.embedding, std=INIT_STD)
    for linear in weights.linears:
        nn.init.normal_(linear.weight, std=INIT_STD)


def gpt2(weights: WeightsByRole) -> None:
    """``normal``, with residual outputs scaled by one over the square root of the number of branches (GPT-2)."""
    normal(weights)
    for branch in weights.branches:
        for linear in branch.outputs:
            nn.init.normal_(linear.weight, std=INIT_STD / math.sqrt(len(weights.branches)))


def xavier(weights: WeightsByRole) -> None:
    """Xavier-uniform matrices (Glorot and Bengio 2010), as in the original Transformer's code.

    Embeddings have unit variance, or variance 1 / n_embd where the head shares them.
    """
    for linear in weights.linears:
        nn.init.xavier_uniform_(linear.weight)
    nn.init.normal_(weights.embedding, std=weights.embedding.size(1) ** -0.5 if weights.tied else 1.0)


INITIALISATIONS: dict[str, Callable[[WeightsByRole], None]] = {
    "zero": zero, "gpt2": gpt2, "normal": normal, "xavier": xavier,
}  # fmt: skip
