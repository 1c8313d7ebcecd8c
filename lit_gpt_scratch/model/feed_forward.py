"""Feed-forward networks. To add another type, subclass ``FeedForward`` and add the subclass to ``FEED_FORWARDS``."""

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_gpt_scratch.kernels.onednn_linear import Linear

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig


class FeedForward(nn.Module):
    """Base class of feed-forward networks, which consist of an up-projection, an activation and a down-projection.

    Subclasses define the activation.

    Attributes:
        hidden_ratio: Hidden width as a multiple of ``n_embd``, used if ``ffn_dim`` is not set.
    """

    hidden_ratio: ClassVar[float] = 4
    tensor_parallel_plan: ClassVar[dict[str, str]] = {"input": "colwise", "gate": "colwise", "output": "rowwise"}

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__()
        self.input = Linear(config.n_embd, config.ffn_width, bias=config.bias)
        self.output = Linear(config.ffn_width, config.n_embd, bias=config.bias)

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


FEED_FORWARDS: dict[str, type[FeedForward]] = {
    "relu": ReLUFeedForward,
    "relu2": SquaredReLUFeedForward,
    "gelu": GELUFeedForward,
    "gelu_exact": ExactGELUFeedForward,
    "swiglu": SwiGLUFeedForward,
    "geglu": GeGLUFeedForward,
}
