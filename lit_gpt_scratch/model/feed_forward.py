"""Feed-forward networks. To add another type, subclass ``FeedForward`` and add the subclass to ``FEED_FORWARDS``."""

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_gpt_scratch.kernels.onednn_linear import Linear
from lit_gpt_scratch.model.moe import ExpertLinear, Experts, Router
from lit_gpt_scratch.trust import import_subclass

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig


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

    A third matrix computes a gate for each hidden channel.
    """

    hidden_ratio = 8 / 3  # three matrices then have as many parameters as two matrices with a ratio of 4

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__(config)
        self.gate = Linear(config.n_embd, config.ffn_width, bias=config.bias)


class SwiGLUFeedForward(GatedFeedForward):
    """Feed-forward network with a SiLU gate (SwiGLU), as in Llama and Qwen."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * hidden


class GeGLUFeedForward(GatedFeedForward):
    """Feed-forward network with a gate that uses the tanh approximation of GELU (GeGLU), as in Gemma."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.gelu(self.gate(x), approximate="tanh") * hidden


class MixtureOfExperts(nn.Module):
    """SwiGLU feed-forward networks, of which a router chooses a few for each token (see ``moe``).

    Shared experts (DeepSeekMoE, https://arxiv.org/abs/2401.06066) are applied to all tokens.
    """

    tensor_parallel_plan: ClassVar[dict[str, str]] = {"experts": "experts"}

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config)
        self.shared = None
        if config.n_shared_experts:  # together, they are one wider network
            self.shared = SwiGLUFeedForward(replace(config, ffn_dim=config.n_shared_experts * config.ffn_width))

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

    def flops_per_token(self, context: int) -> int:
        """Return the number of FLOPs per token in the forward pass: two for each weight that the token uses."""
        return 2 * (sum(p.numel() for p in self.parameters()) - self.inactive_parameters())

    def inactive_parameters(self) -> int:
        """Return the number of weights that a token does not use: those of the experts that it does not choose."""
        inactive = self.config.n_experts - self.config.experts_per_token
        return sum(p.numel() for p in self.experts.parameters()) * inactive // self.config.n_experts


def _hidden_dim(width: float) -> int:
    """Round a hidden width to a multiple of 32."""
    return max(32, round(width / 32) * 32)


FEED_FORWARDS: dict[str, type[FeedForward] | type[MixtureOfExperts]] = {
    "relu": ReLUFeedForward,
    "relu2": SquaredReLUFeedForward,
    "gelu": GELUFeedForward,
    "gelu_exact": ExactGELUFeedForward,
    "swiglu": SwiGLUFeedForward,
    "geglu": GeGLUFeedForward,
    "moe": MixtureOfExperts,
}


def resolve_feed_forward_class(name: str) -> type[FeedForward] | type[MixtureOfExperts]:
    """Return the feed-forward class with the given name or import path.

    The module that defines a class with an import path is imported, which runs its code.

    Raises:
        UserError: The path cannot be imported, or does not refer to a subclass of ``FeedForward``.
    """
    return FEED_FORWARDS.get(name) or import_subclass(name, FeedForward, "model.gpt.feed_forward")
