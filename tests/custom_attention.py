"""A user's own attention, found by its path."""

from typing import Any

import torch
from torch import Tensor

from lit_gpt_scratch.model.attention import Attention


class DoubledAttention(Attention):
    """Every head twice as loud."""

    def attend(self, *args: Any) -> Tensor:
        return 2 * super().attend(*args)


class AveragingAttention(Attention):
    """Its mean over all before, and no weights to tell of."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
        return v.cumsum(2) / torch.arange(1, v.size(2) + 1, device=v.device)[:, None]
