"""The feed-forward part of a block. A kind of one's own is a class here, and its name in the table below."""

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_gpt_scratch.kernels.onednn_linear import Linear

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig


class FeedForward(nn.Module):
    """Widen, bend, narrow: ``output(activation(input(x)))``. Subclasses say how to bend.

    Attributes:
        ratio: Hidden width by ``n_embd``, where the config names none.
    """

    ratio: ClassVar[float] = 4

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__()
        self.input = Linear(config.n_embd, config.ffn_width, bias=config.bias)
        self.output = Linear(config.ffn_width, config.n_embd, bias=config.bias)

    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x: (B, T, n_embd), hidden: (B, T, ffn_dim) -> (B, T, ffn_dim)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, n_embd) -> (B, T, n_embd)."""
        out: Tensor = self.output(self.activation(x, self.input(x)))
        return out


class ReLUFeedForward(FeedForward):
    """The original Transformer's (https://arxiv.org/abs/1706.03762)."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.relu(hidden)


class SquaredReLUFeedForward(FeedForward):
    """Squared ReLU (https://arxiv.org/abs/2109.08668)."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.relu(hidden).square()


class GELUFeedForward(FeedForward):
    """GPT-2's: the Gaussian error linear unit in its tanh form (https://arxiv.org/abs/1606.08415)."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.gelu(hidden, approximate="tanh")


class ExactGELUFeedForward(FeedForward):
    """The same by the error function, as in BERT and GPT-NeoX; PyTorch's kernels for CPUs are faster at it."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.gelu(hidden)


class GatedFeedForward(FeedForward):
    """A third matrix makes a gate for each hidden channel (https://arxiv.org/abs/2002.05202)."""

    ratio = 8 / 3  # as many parameters as four times with two matrices

    def __init__(self, config: "GPTConfig") -> None:
        super().__init__(config)
        self.gate = Linear(config.n_embd, config.ffn_width, bias=config.bias)


class SwiGLUFeedForward(GatedFeedForward):
    """Llama's and Qwen's: the gate is bent by x * sigmoid(x)."""

    @override
    def activation(self, x: Tensor, hidden: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * hidden


class GeGLUFeedForward(GatedFeedForward):
    """Gemma's: the gate is bent by the GELU in its tanh form."""

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
