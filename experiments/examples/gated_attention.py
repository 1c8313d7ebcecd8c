"""Gated attention (https://arxiv.org/abs/2505.06708), an example of a custom attention class; copy it and change it."""

import torch
from torch import Tensor

from lit_gpt_scratch.kernels.onednn_linear import Linear
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.attention import Attention


class GatedAttention(Attention):
    """Multiply each channel of the output of attention by a sigmoid gate that is computed from the block's input.

    Heads can thus output zero, so that they need not attend to the first token instead (attention sink). For one gate
    per head, give ``gate`` only ``n_head`` outputs and repeat each of them ``head_dim`` times.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.gate = Linear(config.n_embd, self.output.in_features, bias=False)

    def combine_heads(self, heads: Tensor, x: Tensor) -> Tensor:
        """Gate the outputs of the heads before they are projected to the residual stream."""
        return super().combine_heads(heads * torch.sigmoid(self.gate(x)), x)
