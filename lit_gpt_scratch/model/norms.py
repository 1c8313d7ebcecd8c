"""Normalisation layers: RMSNorm, and the choice between it and LayerNorm."""

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORMS: Final = ("rmsnorm", "layernorm")
NORM_PLACEMENTS: Final = ("pre", "post", "sandwich")


class RMSNorm(nn.Module):
    """Divide by the root mean square, multiply by a learned gain (https://arxiv.org/abs/1910.07467).

    The mean square is computed in the weight's dtype, float32 under autocast, as in Llama and Qwen.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) -> (..., width), same dtype."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).type_as(x)


def build_norm(kind: str, width: int, eps: float, bias: bool) -> nn.Module:
    """A normalisation layer.

    Args:
        kind: ``rmsnorm``, or ``layernorm`` (https://arxiv.org/abs/1607.06450).
        width: Channels.
        eps: Added to the mean square or variance.
        bias: Whether a LayerNorm has a bias; an RMSNorm has none.
    """
    return nn.LayerNorm(width, eps, bias=bias) if kind == "layernorm" else RMSNorm(width, eps)
