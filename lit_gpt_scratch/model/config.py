"""GPTConfig: every architectural choice of the transformer, as plain data."""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args, get_type_hints

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.feed_forward import FEED_FORWARDS
from lit_gpt_scratch.model.norms import NORM_PLACEMENTS, NORMS
from lit_gpt_scratch.model.positions import POSITION_ENCODINGS, ROTARY_SCALINGS
from lit_gpt_scratch.model.weight_init import INITIALISATIONS

BackendName = Literal["auto", "sdpa", "manual", "flex"]
if TYPE_CHECKING:  # mypy needs literals; at run time the choices, also those of --help, come from the tables
    FeedForwardName: TypeAlias = str
    InitialisationName: TypeAlias = str
    NormName: TypeAlias = str
    PlacementName: TypeAlias = str
    PositionName: TypeAlias = str
    ScalingName: TypeAlias = str
else:
    FeedForwardName = Literal[tuple(FEED_FORWARDS)]
    InitialisationName = Literal[tuple(INITIALISATIONS)]
    NormName, PlacementName = Literal[NORMS], Literal[NORM_PLACEMENTS]
    PositionName = Literal[tuple(POSITION_ENCODINGS)]
    ScalingName = Literal[ROTARY_SCALINGS]

MAY_BE_ZERO = ("dropout",)


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of a GPT. Vocabulary size and context length belong to the data and are not set here.

    The defaults are a small Qwen3: rotary positions, RMSNorm, QK-norm, SwiGLU, no biases.

    Args:
        n_layer: Number of transformer blocks.
        n_head: Query heads per block.
        n_embd: Width of the residual stream; a multiple of ``n_head``.
        n_kv_head: Key/value heads: ``n_head`` (the default) is multi-head attention, 1 is multi-query,
            a divisor in between is grouped-query attention (https://arxiv.org/abs/2305.13245).
        head_dim: Width of one head; ``n_embd // n_head`` by default.
        attention: Import path of your own attention class, ``my_file.MyAttention``; it inherits from
            ``model.attention.Attention``.
        attention_backend: ``sdpa`` is PyTorch's fused kernel, ``manual`` a step-by-step softmax, ``flex``
            FlexAttention; ``auto`` takes the fastest that supports the other settings. The results are the same.
        attention_softcap: Bound the attention scores to (-cap, cap) by ``cap * tanh(scores / cap)``
            (Gemma 2, https://arxiv.org/abs/2408.00118); off by default.
        sliding_window: A token attends to itself and the ``sliding_window - 1`` tokens before it
            (Mistral, https://arxiv.org/abs/2310.06825); by default to all before it.
        qk_norm: Normalise queries and keys per head before the dot product
            (https://arxiv.org/abs/2302.05442); keeps attention logits bounded.
        position: Position encoding: ``rotary`` (https://arxiv.org/abs/2104.09864), ``learned`` (GPT-2),
            ``sinusoidal`` (https://arxiv.org/abs/1706.03762), ``alibi`` (https://arxiv.org/abs/2108.12409) or ``none``.
        rotary_base: Base of the rotary wavelengths (``rope_theta``).
        rotary_share: Fraction of each head's channels that is rotated, the first ones (GPT-NeoX).
        rotary_scaling: Scaling of rotary positions to contexts longer than those of training: ``linear``, ``ntk``,
            ``llama3`` or ``yarn`` (see ``model.positions``).
        rotary_factor: Ratio of the longer context to that of training.
        rotary_trained_context: Context length in training, in tokens; for ``llama3`` and ``yarn``.
        rotary_slow: Channel pairs with fewer turns than this in the trained context are slowed by the full factor; 1
            by default.
        rotary_fast: Channel pairs with more turns are not slowed; by default 4 for ``llama3`` and 32 for ``yarn``.
        norm: ``rmsnorm`` (https://arxiv.org/abs/1910.07467) or ``layernorm`` (https://arxiv.org/abs/1607.06450).
        norm_eps: Added to the mean square or variance.
        norm_placement: ``pre`` normalises the input of each residual branch (GPT-2, Llama), ``post`` the residual
            stream after each addition (the original Transformer), ``sandwich`` input and output of each branch
            (Gemma 2).
        bias: Biases in linear layers and LayerNorms (GPT-2); the head has none.
        feed_forward: ``swiglu``, ``geglu`` (https://arxiv.org/abs/2002.05202), ``relu2``
            (https://arxiv.org/abs/2109.08668), ``gelu`` (GPT-2), ``gelu_exact`` or ``relu``.
        ffn_dim: Hidden width of the feed-forward network. By default 4 * n_embd, or 8/3 * n_embd for the gated kinds,
            which have a third matrix and so the same number of parameters; rounded to a multiple of 32.
        tied_embeddings: Share one matrix between embedding and head (https://arxiv.org/abs/1608.05859).
        vocab_multiple: Round the rows of embedding and head up to a multiple of this, which is faster on some
            hardware; the padding rows are never predicted.
        logit_softcap: Bound the logits to (-cap, cap) by ``cap * tanh(logits / cap)``
            (Gemma 2, https://arxiv.org/abs/2408.00118); off by default.
        value_embeddings: In every block, add a learned vector per token to attention's values
            (modded-nanogpt, after https://arxiv.org/abs/2410.17897).
        bigram_rows: Rows of a table that adds a learned vector per bigram to the token embedding; bigrams share rows by
            a hash (modded-nanogpt). Off by default.
        smear: Add a learned share of the previous token's embedding to every token's (modded-nanogpt).
        residual_scalars: In every block, scale the residual stream, and add the embeddings again, by two learned
            scalars (modded-nanogpt).
        dropout: Dropout probability of embeddings, attention weights and residual branches, as in GPT-2.
        initialisation: ``zero`` starts blocks as the identity and logits at zero, ``gpt2`` and ``normal`` draw from a
            normal distribution with standard deviation 0.02 (GPT-2, Llama), ``xavier`` is that of the original
            Transformer (see ``model.weight_init``).

    Raises:
        UserError: A size is not positive, sizes are not divisible, a probability is out of range, or two settings
            contradict each other.
    """

    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 192
    n_kv_head: int | None = None
    head_dim: int | None = None
    attention: str | None = None
    attention_backend: BackendName = "auto"
    attention_softcap: float | None = None
    sliding_window: int | None = None
    qk_norm: bool = True
    position: PositionName = "rotary"
    rotary_base: float = 10_000.0
    rotary_share: float = 1.0
    rotary_scaling: ScalingName | None = None
    rotary_factor: float = 1.0
    rotary_trained_context: int | None = None
    rotary_slow: float | None = None
    rotary_fast: float | None = None
    norm: NormName = "rmsnorm"
    norm_eps: float = 1e-6
    norm_placement: PlacementName = "pre"
    bias: bool = False
    feed_forward: FeedForwardName = "swiglu"
    ffn_dim: int | None = None
    tied_embeddings: bool = False
    vocab_multiple: int = 1
    logit_softcap: float | None = None
    value_embeddings: bool = False
    bigram_rows: int | None = None
    smear: bool = False
    residual_scalars: bool = False
    dropout: float = 0.0
    initialisation: InitialisationName = "zero"

    def __post_init__(self) -> None:
        hints = get_type_hints(GPTConfig)
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(hints[field.name])
            if isinstance(value, str) and field.name != "attention":
                named = [c for choice in choices for c in (get_args(choice) or [choice]) if isinstance(c, str)]
                if value not in named:
                    raise UserError(f"model.gpt.{field.name} is {value}; it must be one of {', '.join(named)}")
            number = isinstance(value, int | float) and not isinstance(value, bool) and field.name not in MAY_BE_ZERO
            if number and not 0 < value < math.inf:
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
        if self.attention_backend == "sdpa" and self.attention_softcap:
            raise UserError(
                f"model.gpt.attention_backend is sdpa, but model.gpt.attention_softcap is {self.attention_softcap}; "
                f"PyTorch's kernel has no soft cap: choose auto, manual or flex"
            )
        if self.attention_backend == "flex" and self.dropout:
            raise UserError(
                f"model.gpt.attention_backend is flex, but model.gpt.dropout is {self.dropout}; FlexAttention has "
                f"no dropout: choose auto, sdpa or manual"
            )
        POSITION_ENCODINGS[self.position].validate(self)

    @property
    def kv_heads(self) -> int:
        """Key/value heads per block, resolved."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Channels of one head, resolved."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def rotary_width(self) -> int:
        """Channels of a head that are rotated."""
        return round(self.head_width * self.rotary_share)

    @property
    def ffn_width(self) -> int:
        """Hidden channels of the feed-forward network, resolved."""
        return self.ffn_dim or max(32, round(FEED_FORWARDS[self.feed_forward].hidden_ratio * self.n_embd / 32) * 32)
