"""The switchboard of the transformer: every architectural choice, as plain data."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from lit_gpt_scratch.errors import UserError

PositionName = Literal["rotary", "learned", "none"]
FeedForwardName = Literal["swiglu", "relu2", "gelu"]


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. Vocabulary and context length belong to the data and are not set here.

    The defaults are a small Qwen3: rotary positions, RMSNorm, per-head QK-norm, SwiGLU, no biases.

    Args:
        n_layer: Number of transformer blocks.
        n_head: Query heads per block.
        n_embd: Width of the residual stream; a multiple of ``n_head``.
        n_kv_head: Key/value heads: ``n_head`` (the default) is multi-head attention, 1 is multi-query,
            a divisor in between is grouped-query attention (https://arxiv.org/abs/2305.13245).
        head_dim: Width of one head; ``n_embd // n_head`` by default.
        position: How the model knows order: ``rotary`` (https://arxiv.org/abs/2104.09864), ``learned``
            (GPT-2's table) or ``none``.
        rotary_base: Wavelength base of the rotary angles.
        qk_norm: Normalise queries and keys per head before the dot product
            (https://arxiv.org/abs/2302.05442); keeps attention logits bounded.
        feed_forward: ``swiglu`` (https://arxiv.org/abs/2002.05202), ``relu2``
            (https://arxiv.org/abs/2109.08668) or ``gelu``.
        ffn_dim: Hidden width of the feed-forward part. By default the multiple of 32 nearest to an
            equal number of parameters for each kind: 4 x n_embd, or 8/3 x n_embd for ``swiglu``, which
            has a third matrix.
        logit_softcap: Squash the logits into (-cap, cap) by ``cap * tanh(logits / cap)``
            (Gemma 2, https://arxiv.org/abs/2408.00118); off by default.
        value_embeddings: Give every block a table of its own that adds a learned vector for each token to
            attention's values (modded-nanogpt, after https://arxiv.org/abs/2410.17897).
        bigram_rows: Rows of a table that adds a learned vector for each pair of neighbouring tokens to the
            embedding; pairs share rows by a hash (modded-nanogpt). Off by default.
        smear: Add to every token's embedding a learned share of the one before it (modded-nanogpt).
        residual_scalars: Let every block scale the stream that it reads, and mix in the embedding that the
            stream began with, by two learned numbers (modded-nanogpt).
        dropout: Probability of zeroing, on embeddings, attention weights and block outputs.

    Raises:
        UserError: A size is not positive, sizes do not divide each other, or a probability is none.
    """

    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 192
    n_kv_head: int | None = None
    head_dim: int | None = None
    position: PositionName = "rotary"
    rotary_base: float = 10_000.0
    qk_norm: bool = True
    feed_forward: FeedForwardName = "swiglu"
    ffn_dim: int | None = None
    logit_softcap: float | None = None
    value_embeddings: bool = False
    bigram_rows: int | None = None
    smear: bool = False
    residual_scalars: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (("position", get_args(PositionName)), ("feed_forward", get_args(FeedForwardName))):
            if getattr(self, name) not in choices:
                raise UserError(f"model.gpt.{name} is {getattr(self, name)}; it must be one of {', '.join(choices)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "dropout" and isinstance(value, int | float) and value <= 0 and value is not False:
                raise UserError(f"model.gpt.{field.name} is {value}; it must be positive")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.gpt.dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(
                f"model.gpt.n_embd ({self.n_embd}) is not divisible by model.gpt.n_head ({self.n_head}); "
                f"choose a multiple, or set model.gpt.head_dim"
            )
        if self.n_head % self.kv_heads:
            raise UserError(
                f"model.gpt.n_head ({self.n_head}) is not divisible by model.gpt.n_kv_head ({self.n_kv_head})"
            )
        if self.position == "rotary" and self.head_width % 2:
            raise UserError(
                f"model.gpt.position rotary turns pairs of channels, but a head has {self.head_width}; "
                f"choose an even model.gpt.head_dim or another position"
            )

    @property
    def kv_heads(self) -> int:
        """Key/value heads per block, resolved."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Channels of one head, resolved."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def ffn_width(self) -> int:
        """Hidden channels of the feed-forward part, resolved."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        ratio = 8 / 3 if self.feed_forward == "swiglu" else 4
        return max(32, round(ratio * self.n_embd / 32) * 32)
