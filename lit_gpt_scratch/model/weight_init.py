"""Weight initialisation schemes. In all of them biases are initialised to zero and the gains of norms to one."""

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
        norm: Norm between these outputs and the residual stream, if the block has one (``norm_placement: sandwich``).
    """

    outputs: list[nn.Linear]
    norm: nn.Module | None


class WeightsByRole(NamedTuple):
    """The weights of a network, grouped by role for an initialisation scheme.

    Attributes:
        embedding: Token embedding, (vocab_size, n_embd).
        linears: All linear layers including the head, in module order, which is the order of the random draws.
        branches: Residual branches of all blocks, in order.
        head: The linear layer of the output head.
        tied: Whether the head's weight will be replaced with the embedding's.
    """

    embedding: Tensor
    linears: list[nn.Linear]
    branches: list[ResidualBranch]
    head: nn.Linear
    tied: bool


def zero(weights: WeightsByRole) -> None:
    """Initialise residual outputs and the head to zero (muP and Fixup style, as in modded-nanogpt).

    Blocks start as the identity. If the head is not tied, the loss starts at exactly ln(vocab_size): the model starts
    from the uniform distribution instead of having to unlearn random predictions. Token embeddings have unit variance,
    so that the outputs of the blocks do not soon dominate them.
    """
    nn.init.normal_(weights.embedding, std=INIT_STD if weights.tied else 1.0)  # a tied embedding is also the head's
    for linear in weights.linears:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    for branch in weights.branches:
        # At zero input the gradient of a norm grows with 1 / eps, so if there is a norm, zero its gain instead.
        for layer in branch.outputs if branch.norm is None else [branch.norm]:
            nn.init.zeros_(layer.get_parameter("weight"))
    if not weights.tied:
        nn.init.zeros_(weights.head.weight)


def normal(weights: WeightsByRole) -> None:
    """Draw all matrices and embeddings from one normal distribution (Llama, Qwen)."""
    nn.init.normal_(weights.embedding, std=INIT_STD)
    for linear in weights.linears:
        nn.init.normal_(linear.weight, std=INIT_STD)


def gpt2(weights: WeightsByRole) -> None:
    """Like ``normal``, but scale residual outputs by one over the square root of the number of branches (GPT-2)."""
    normal(weights)
    for branch in weights.branches:
        for linear in branch.outputs:
            nn.init.normal_(linear.weight, std=INIT_STD / math.sqrt(len(weights.branches)))


def xavier(weights: WeightsByRole) -> None:
    """Draw matrices from a Xavier-uniform distribution (Glorot and Bengio 2010), as in the original Transformer's code.

    Embeddings have unit variance, or variance 1 / n_embd if they are tied to the head.
    """
    for linear in weights.linears:
        nn.init.xavier_uniform_(linear.weight)
    nn.init.normal_(weights.embedding, std=weights.embedding.size(1) ** -0.5 if weights.tied else 1.0)


INITIALISATIONS: dict[str, Callable[[WeightsByRole], None]] = {
    "zero": zero, "gpt2": gpt2, "normal": normal, "xavier": xavier,
}  # fmt: skip
