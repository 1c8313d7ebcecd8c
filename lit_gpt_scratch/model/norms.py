"""Normalisation of the residual stream, and of queries and keys."""

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig

NORMS: Final = ("rmsnorm", "layernorm")
NORM_PLACEMENTS: Final = ("pre", "post", "sandwich")


class RMSNorm(nn.Module):
    """Divide by the root mean square, scale by a learned gain (https://arxiv.org/abs/1910.07467).

    The statistic is taken in float32 where weights and input have fewer bits, as Llama and Qwen do.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) -> (..., width), same dtype."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).type_as(x)


def build_norm(config: "GPTConfig") -> nn.Module:
    """A norm of the residual stream, of the kind that ``config.norm`` names."""
    if config.norm == "layernorm":  # https://arxiv.org/abs/1607.06450
        return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
    return RMSNorm(config.n_embd, config.norm_eps)
