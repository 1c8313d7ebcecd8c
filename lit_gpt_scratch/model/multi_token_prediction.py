"""Multi-token prediction: modules that predict tokens further ahead during training, one after the other."""

from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from lit_gpt_scratch.kernels.onednn_linear import Linear
from lit_gpt_scratch.model.activation_checkpointing import ActivationCheckpointing
from lit_gpt_scratch.model.attention import AttentionLayout
from lit_gpt_scratch.model.config import GPTConfig
from lit_gpt_scratch.model.module_metadata import OptimizerGroup, flops_per_token
from lit_gpt_scratch.model.norms import build_norm
from lit_gpt_scratch.model.positions import PositionEncoding

MULTI_TOKEN_PREFIX: Final = "multi_token_modules."
"""Prefix of the names of all weights of these modules in the state dict of a ``GPT``."""


class MultiTokenModule(nn.Module):
    """Module that predicts one token further ahead than the states that it reads (DeepSeek-V3, section 2.2).

    It combines each state with the embedding of the next known token, and applies a transformer block::

        h = norm(block(combine([state_norm(state), embedding_norm(embedding)])))

    The embedding and the output head are those of the network (https://arxiv.org/abs/2412.19437).

    Args:
        config: The architecture.
        block: Transformer block with the same architecture.
        n_outputs: Number of output features of the network's head, for ``flops_per_token``.
    """

    optimizer_group: ClassVar[OptimizerGroup] = "matrices"

    def __init__(self, config: GPTConfig, block: nn.Module, n_outputs: int) -> None:
        super().__init__()
        self.state_norm, self.embedding_norm, self.norm = (
            build_norm(config.norm, config.n_embd, config.norm_eps, config.bias) for _ in range(3)
        )
        self.combine = Linear(2 * config.n_embd, config.n_embd, bias=config.bias)
        self.block = block
        self.head_flops = 2 * config.n_embd * n_outputs

    def forward(
        self,
        state: Tensor,
        embedding: Tensor,
        position: PositionEncoding,
        layout: AttentionLayout,
        checkpointing: ActivationCheckpointing = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the states from which the head predicts one token further ahead.

        Args:
            state: Output of ``GPT.hidden_states`` or of the previous module, of shape (B, T, n_embd).
            embedding: Embedding of the token that ``state`` predicts, of shape (B, T, n_embd).
            position: The position encoding.
            layout: Positions and attention mask of the states.
            checkpointing: What the block stores for the backward pass.

        Returns:
            The new states, of shape (B, T, n_embd), and the block's router logits (see ``Block.forward``).
        """
        x = torch.cat((self.state_norm(state), self.embedding_norm(embedding)), dim=-1)  # (B, T, 2 * n_embd)
        x = self.combine(x)  # (B, T, n_embd)
        x, router_logits = self.block(x, x, position, layout, None, None, checkpointing)
        return self.norm(x), router_logits

    def flops_per_token(self, context: int) -> int:
        """Return the number of FLOPs per token in the forward pass, including those of the shared output head."""
        return sum(flops_per_token(child, context) for child in self.children()) + self.head_flops
