"""Feed-forward networks. To add another type, subclass ``FeedForward`` and add the subclass to ``FEED_FORWARDS``."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_gpt_scratch.kernels.onednn_linear import Linear
from lit_gpt_scratch.model.moe import ExpertLinear, Experts, Router
from lit_gpt_scratch.trust import import_subclass

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig

SWIGLU_LIMIT: Final = 7.0
SWIGLU_SLOPE: Final = 1.702
"""Bound of the clamped SwiGLU and factor in its sigmoid, in gpt-oss called ``swiglu_limit`` and ``swiglu_alpha``."""


class FeedForward(nn.Module):
    """Base class of feed-forward networks, which consist of an up-projection, an activation and a down-projection.

    Subclasses define the activation. To use a custom subclass, set ``model.gpt.feed_forward`` to its import path.

    Attributes:
        hidden_ratio: Hidden width as a multiple of ``n_embd``, used if ``ffn_dim`` is not set.
    """

    hidden_ratio: ClassVar[float] = 4
    tensor_parallel_plan: ClassVar[dict[str, str]] = {"input": "colwise", "gate": "colwise", "output": "rowwise"}

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__()
        self.input = Linear(config.n_embd, config.ffn_width, bias=config.bias)
        self.output = Linear(config.ffn_width, config.n_embd, bias=config.bias)

    @classmethod
    def default_hidden_dim(cls, config: "GPTConfig") -> int:
        """Return the hidden width that is used if ``ffn_dim`` is not set."""
        return _hidden_dim(cls.hidden_ratio * config.n_embd)

    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Apply the activation function.

        Args:
            x: Input of the network, of shape (B, T, n_embd), from which gated networks compute the gate.
            hidden: Up-projection of ``x``, of shape (B, T, ffn_dim).

        Returns:
            The activations, of shape (B, T, ffn_dim).
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward network: (B, T, n_embd) -> (B, T, n_embd)."""
        out: Tensor = self.output(self.activation(x, self.input(x)))
        return out

    def residual_outputs(self) -> list[nn.Linear]:
        """Return the layers whose outputs are added to the residual stream: the down-projection."""
        return [self.output]


class ReLUFeedForward(FeedForward):
    """Feed-forward network with ReLU, as in the original Transformer (https://arxiv.org/abs/1706.03762)."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.relu(hidden)


class SquaredReLUFeedForward(FeedForward):
    """Feed-forward network with squared ReLU (https://arxiv.org/abs/2109.08668)."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.relu(hidden).square()


class GELUFeedForward(FeedForward):
    """Feed-forward network with the tanh approximation of GELU, as in GPT-2 (https://arxiv.org/abs/1606.08415)."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.gelu(hidden, approximate="tanh")


class ExactGELUFeedForward(FeedForward):
    """Feed-forward network with exact GELU, as in BERT and GPT-NeoX.

    On CPUs, PyTorch's kernels for exact GELU are faster than those for the tanh approximation.
    """

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.gelu(hidden)


class GatedFeedForward(FeedForward):
    """Base class of gated feed-forward networks (https://arxiv.org/abs/2002.05202).

    A third matrix computes a gate for each hidden channel. Subclasses define how gates and channels are combined.
    """

    hidden_ratio = 8 / 3  # three matrices then have as many parameters as two matrices with a ratio of 4

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__(config)
        self.gate = Linear(config.n_embd, config.ffn_width, bias=config.bias)

    @staticmethod
    def gated_activation(gate: Tensor, hidden: Tensor) -> Tensor:
        """Combine the gates and the up-projection, both of shape (..., ffn_dim), to activations of the same shape."""
        raise NotImplementedError

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.gated_activation(self.gate(x), hidden)


class SwiGLUFeedForward(GatedFeedForward):
    """Feed-forward network with a SiLU gate (SwiGLU), as in Llama and Qwen."""

    @staticmethod
    @override
    def gated_activation(gate: Tensor, hidden: Tensor) -> Tensor:
        return F.silu(gate) * hidden


class ClampedSwiGLUFeedForward(GatedFeedForward):
    """Feed-forward network with the clamped SwiGLU of gpt-oss (https://arxiv.org/abs/2508.10925).

    The gate, clamped to at most 7, is multiplied by the sigmoid of 1.702 times itself, which approximates GELU. The
    up-projection is clamped to [-7, 7] and increased by 1.
    """

    @staticmethod
    @override
    def gated_activation(gate: Tensor, hidden: Tensor) -> Tensor:
        gate, hidden = gate.clamp(max=SWIGLU_LIMIT), hidden.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return gate * torch.sigmoid(SWIGLU_SLOPE * gate) * (hidden + 1)


class GeGLUFeedForward(GatedFeedForward):
    """Feed-forward network with a gate that uses the tanh approximation of GELU (GeGLU), as in Gemma."""

    @staticmethod
    @override
    def gated_activation(gate: Tensor, hidden: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * hidden


class MixtureOfExperts(nn.Module):
    """Gated feed-forward networks, of which a router chooses a few for each token (see ``moe``).

    Shared experts (DeepSeekMoE, https://arxiv.org/abs/2401.06066) are applied to all tokens.
    """

    tensor_parallel_plan: ClassVar[dict[str, str]] = {"experts": "experts"}

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__()
        expert_class = GATED_FEED_FORWARDS[config.expert_activation]
        self.router = Router(config)
        self.experts = Experts(config, expert_class.gated_activation)
        self.shared = None
        if config.n_shared_experts:  # together, they are one wider network
            self.shared = expert_class(replace(config, ffn_dim=config.n_shared_experts * config.ffn_width))

    @classmethod
    def default_hidden_dim(cls, config: "GPTConfig") -> int:
        """Return the width of an expert with which as many parameters are active as SwiGLU has by default."""
        active = config.experts_per_token + config.n_shared_experts
        return _hidden_dim(GatedFeedForward.hidden_ratio * config.n_embd / active)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Apply each token's experts.

        Args:
            x: Input, of shape (B, T, n_embd).

        Returns:
            The output, of shape (B, T, n_embd), and the router logits, of shape (B, T, n_experts).
        """
        B, T, _ = x.shape
        logits = self.router(x)
        routing = self.router.route(logits)
        experts, gates = routing.experts.flatten(0, 1), routing.gates.flatten(0, 1)  # (B * T, experts_per_token)
        out: Tensor = self.experts(x.flatten(0, 1), experts, gates).view(B, T, -1)
        return (out if self.shared is None else out + self.shared(x)), logits

    def residual_outputs(self) -> list[nn.Linear | ExpertLinear]:
        """Return the layers whose outputs are added to the residual stream: the down-projections."""
        return [self.experts.output, *([] if self.shared is None else [self.shared.output])]


def _hidden_dim(width: float) -> int:
    """Round a hidden width to a multiple of 32."""
    return max(32, round(width / 32) * 32)


GATED_FEED_FORWARDS: dict[str, type[GatedFeedForward]] = {
    "swiglu": SwiGLUFeedForward,
    "geglu": GeGLUFeedForward,
    "clamped_swiglu": ClampedSwiGLUFeedForward,
}
"""Types that the experts of ``MixtureOfExperts`` can have, too."""
FEED_FORWARDS: dict[str, type[FeedForward] | type[MixtureOfExperts]] = {
    "relu": ReLUFeedForward,
    "relu2": SquaredReLUFeedForward,
    "gelu": GELUFeedForward,
    "gelu_exact": ExactGELUFeedForward,
    **GATED_FEED_FORWARDS,
    "moe": MixtureOfExperts,
}


def resolve_feed_forward_class(name: str) -> type[FeedForward] | type[MixtureOfExperts]:
    """Return the feed-forward class with the given name or import path.

    The module that defines a class with an import path is imported, which runs its code.

    Raises:
        UserError: The path cannot be imported, or does not refer to a subclass of ``FeedForward``.
    """
    return FEED_FORWARDS.get(name) or import_subclass(name, FeedForward, "model.gpt.feed_forward")
