"""How the transformer knows order. A scheme may add to the embeddings, turn queries and keys, or do nothing."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_gpt_scratch.model.config import GPTConfig


class Position(nn.Module):
    """No positions at all, and the interface of the others (causal attention alone still leaks some order).

    ``positions`` are (B, T) int64, or None where every token stands as far from the first as in the window.
    """

    def embed(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Add positions to token embeddings. x: (B, T, n_embd) -> (B, T, n_embd)."""
        return x

    def rotate(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Turn queries or keys by their position. x: (B, H, T, head_dim) -> (B, H, T, head_dim)."""
        return x


class Learned(Position):
    """One learned vector a position, added to the embedding (GPT-2)."""

    def __init__(self, config: GPTConfig, block_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(block_size, config.n_embd)
        nn.init.normal_(self.table.weight, std=0.02)  # GPT-2's

    @override
    def embed(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return x + (self.table.weight[: x.size(1)] if positions is None else self.table(positions))


class Rotary(Position):
    """Rotary positions (https://arxiv.org/abs/2104.09864), in the half-split layout of Llama and Qwen.

    Channel ``i`` of the first half and of the second half form a pair; at position ``t`` the pair is turned
    by the angle ``t * base ** (-2i / head_dim)``. A dot product of a turned query and a turned key depends
    only on how far apart they stand.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, block_size: int) -> None:
        super().__init__()
        half = torch.arange(0, config.head_width, 2, dtype=torch.float32)  # (head_dim / 2,)
        frequency = config.rotary_base ** (-half / config.head_width)
        angle = torch.outer(torch.arange(block_size, dtype=torch.float32), frequency)  # (T, head_dim / 2)
        # A table, not parameters: made anew on every construction, never stored in a checkpoint.
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    @override
    def rotate(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            cos, sin = self.cos[: x.size(-2)], self.sin[: x.size(-2)]  # (T, head_dim / 2)
        else:
            cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, T, head_dim / 2)
        first, second = x.float().chunk(2, dim=-1)  # (B, H, T, head_dim / 2) each
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


def build_position(config: GPTConfig, block_size: int) -> Position:
    """The scheme that ``config.position`` names."""
    if config.position == "rotary":
        return Rotary(config, block_size)
    if config.position == "learned":
        return Learned(config, block_size)
    return Position()
