"""Normalization layers: RMSNorm and LayerNorm."""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt_scratch.model.weight_sampler import WeightSampler

NORMS: Final = ("rmsnorm", "layernorm")
NORM_PLACEMENTS: Final = ("pre", "post", "output", "sandwich")


class RMSNorm(nn.Module):
    """Root mean square normalization with a learned gain (https://arxiv.org/abs/1910.07467).

    The mean square is computed in the dtype of the weight (float32 under autocast), as in Llama and Qwen.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def init_weights(self, sampler: WeightSampler) -> None:
        """Initialize the gain to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a tensor of shape (..., width) over its last dimension, preserving its shape and dtype."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).type_as(x)


def build_norm(kind: str, width: int, eps: float, bias: bool) -> nn.Module:
    """Build a normalization layer.

    Args:
        kind: ``rmsnorm`` or ``layernorm`` (https://arxiv.org/abs/1607.06450).
        width: Number of channels.
        eps: Epsilon added to the mean square or variance.
        bias: Whether a LayerNorm has a bias; an RMSNorm never has one.
    """
    return nn.LayerNorm(width, eps, bias=bias) if kind == "layernorm" else RMSNorm(width, eps)
