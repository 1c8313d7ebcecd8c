"""Weight initialization schemes.

Random weights are drawn by a ``WeightSampler``, so that they do not depend on how the model is sharded. Unless stated
otherwise, biases are initialized to zero and the gains of normalization layers to one.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lit_gpt_scratch.model.moe import ExpertLinear
from lit_gpt_scratch.model.norms import set_gain
from lit_gpt_scratch.model.weight_sampler import WeightSampler

INIT_STD = 0.02
"""Standard deviation of the initial matrices and embeddings in GPT-2, Llama and Qwen."""


class ResidualBranch(NamedTuple):
    """Attention or feed-forward branch of a transformer block.

    Attributes:
        outputs: Linear layers whose outputs are added to the residual stream.
        norm: Normalization layer that is applied to these outputs before they are added to the residual stream, or None
            if ``norm_placement`` is neither ``output`` nor ``sandwich``.
    """

    outputs: Sequence[nn.Linear | ExpertLinear]
    norm: nn.Module | None


class WeightsByRole(NamedTuple):
    """Weights of a network, grouped by their role in an initialization scheme.

    Attributes:
        embedding: Token embedding, of shape (vocab_size, n_embd).
        linears: All linear layers, including the head unless its weight is tied to the embedding.
        branches: Residual branches of all blocks, from the first block to the last.
        head: Linear layer of the output head, or None if its weight is tied to the embedding.
        readouts: The linear layers that map to a number of outputs that does not depend on the width, such as the head.
        width_multiplier: See ``GPTConfig.width_multiplier``.
    """

    embedding: Tensor
    linears: list[nn.Linear | ExpertLinear]
    branches: list[ResidualBranch]
    head: nn.Linear | None
    readouts: frozenset[nn.Linear | ExpertLinear]
    width_multiplier: float

    def scale(self, linear: nn.Linear | ExpertLinear) -> float:
        """Return the factor by which the standard deviation of a layer's weights differs from that at the base width.

        The outputs of hidden layers keep their scale; those of readouts decrease with the square root of the width, so
        that random weights do not dominate their gradients (https://arxiv.org/abs/2203.03466, table 3).
        """
        return 1 / (self.width_multiplier if linear in self.readouts else math.sqrt(self.width_multiplier))


def zero(weights: WeightsByRole, sampler: WeightSampler) -> None:
    """Initialize the output layers of residual branches and the head to zero, as in modded-nanogpt, Fixup and muP.

    Each residual branch initially outputs zero; if a branch ends with a norm, the gain of the norm is initialized to
    zero instead of the output layer. If the head is not tied, the initial predictions are uniform and the initial loss
    is exactly ln(vocab_size), so that the model does not have to unlearn random predictions. Untied token embeddings
    have unit variance, so that they are not soon dominated by the outputs of the blocks.
    """
    sampler.normal_(weights.embedding, 1.0 if weights.head else INIT_STD)  # a tied embedding is also the head
    for linear in weights.linears:
        sampler.normal_(linear.weight, (linear.in_features / weights.width_multiplier) ** -0.5 * weights.scale(linear))
    for branch in weights.branches:
        # The gradient of a norm is very large at zero input, so the gain of the norm is initialized to zero instead.
        if branch.norm is not None:
            set_gain(branch.norm, 0.0)
        else:
            for layer in branch.outputs:
                nn.init.zeros_(layer.weight)
    if weights.head is not None:
        nn.init.zeros_(weights.head.weight)


def normal(weights: WeightsByRole, sampler: WeightSampler) -> None:
    """Initialize all matrices and embeddings from a normal distribution, as in Llama and Qwen."""
    sampler.normal_(weights.embedding, INIT_STD)
    for linear in weights.linears:
        sampler.normal_(linear.weight, INIT_STD * weights.scale(linear))


def gpt2(weights: WeightsByRole, sampler: WeightSampler) -> None:
    """Initialize as in ``normal``, but scale down the output layers of residual branches, as in GPT-2.

    The standard deviation of these layers is divided by the square root of the number of branches.
    """
    outputs = {linear for branch in weights.branches for linear in branch.outputs}
    sampler.normal_(weights.embedding, INIT_STD)
    for linear in weights.linears:
        std = INIT_STD / math.sqrt(len(weights.branches)) if linear in outputs else INIT_STD
        sampler.normal_(linear.weight, std * weights.scale(linear))


def xavier(weights: WeightsByRole, sampler: WeightSampler) -> None:
    """Apply Xavier uniform initialization (Glorot and Bengio 2010), as in the code of the original Transformer.

    Embeddings have unit variance, or variance 1 / n_embd if they are tied to the head.
    """
    m = weights.width_multiplier
    for linear in weights.linears:
        inputs = linear.in_features / m
        outputs = linear.out_features / (1 if linear in weights.readouts else m)
        sampler.uniform_(linear.weight, math.sqrt(6 / (inputs + outputs)) * weights.scale(linear))
    sampler.normal_(weights.embedding, 1.0 if weights.head else (weights.embedding.size(1) / m) ** -0.5)


INITIALISATIONS: dict[str, Callable[[WeightsByRole, WeightSampler], None]] = {
    "zero": zero, "gpt2": gpt2, "normal": normal, "xavier": xavier,
}  # fmt: skip
