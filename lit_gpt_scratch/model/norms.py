"""Normalization layers: RMSNorm and LayerNorm."""

from typing import ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lit_gpt_scratch.model.weight_sampler import WeightSampler

NORM_PLACEMENTS: Final = ("pre", "post", "output", "sandwich")


class RMSNorm(nn.Module):
    """Root mean square normalization with a learned gain (https://arxiv.org/abs/1910.07467).

    The mean square is computed in the dtype of the weight (float32 under autocast), as in Llama and Qwen.

    Attributes:
        offset: Difference between the gain and ``weight``.
    """

    offset: ClassVar[float] = 0.0

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset))

    def init_weights(self, sampler: WeightSampler) -> None:
        """Initialize the gain to one."""
        set_gain(self, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a tensor of shape (..., width) over its last dimension, preserving its shape and dtype."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).type_as(x)


class ZeroCenteredRMSNorm(RMSNorm):
    """RMSNorm whose gain is ``1 + weight`` (Gemma).

    It is computed in at least float32, because 16 bits would round the gain.
    """

    offset = 1.0

    @override
    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        gain = self.offset + self.weight.to(dtype)
        return F.rms_norm(x.to(dtype), gain.shape, gain, self.eps).type_as(x)


RMS_NORMS: Final[dict[str, type[RMSNorm]]] = {"rmsnorm": RMSNorm, "zero_centered_rmsnorm": ZeroCenteredRMSNorm}
NORMS: Final = (*RMS_NORMS, "layernorm")


def build_norm(kind: str, width: int, eps: float, bias: bool) -> nn.Module:
    """Build a normalization layer.

    Args:
        kind: One of ``RMS_NORMS``, or ``layernorm`` (https://arxiv.org/abs/1607.06450).
        width: Number of channels.
        eps: Epsilon added to the mean square or variance.
        bias: Whether a LayerNorm has a bias; an RMSNorm never has one.
    """
    return nn.LayerNorm(width, eps, bias=bias) if kind == "layernorm" else RMS_NORMS[kind](width, eps)


def set_gain(norm: nn.Module, gain: float) -> None:
    """Set the gain of all channels of a normalization layer."""
    nn.init.constant_(norm.get_parameter("weight"), gain - getattr(norm, "offset", 0.0))
