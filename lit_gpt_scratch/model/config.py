"""The switchboard of the transformer: every architectural choice, as plain data."""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args, get_type_hints

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.feed_forward import FEED_FORWARDS
from lit_gpt_scratch.model.init import INITIALISATIONS
from lit_gpt_scratch.model.norms import NORM_PLACEMENTS, NORMS
from lit_gpt_scratch.model.positions import POSITION_ENCODINGS, ROTARY_SCALINGS

BackendName = Literal["auto", "sdpa", "manual", "flex"]
if TYPE_CHECKING:  # what there is to choose from is said where it is written, and --help reads it there
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
    """The shape of a GPT. Vocabulary and context length belong to the data and are not set here.

    The defaults are a small Qwen3: rotary positions, RMSNorm, per-head QK-norm, SwiGLU, no biases.

    Args:
        n_layer: Number of transformer blocks.
        n_head: Query heads per block.
        n_embd: Width of the residual stream; a multiple of ``n_head``.
        n_kv_head: Key/value heads: ``n_head`` (the default) is multi-head attention, 1 is multi-query,
            a divisor in between is grouped-query attention (https://arxiv.org/abs/2305.13245).
        head_dim: Width of one head; ``n_embd // n_head`` by default.
        attention: A class of your own by its import path, ``my_file.Mine``; it inherits from
            ``model.attention.Attention``.
        attention_backend: ``sdpa`` is PyTorch's fused kernel, ``manual`` the textbook's softmax, ``flex``
            FlexAttention; ``auto`` takes the fastest that can do what is asked. The numbers are the same.
        attention_softcap: Squash attention's scores into (-cap, cap) by ``cap * tanh(scores / cap)``
            (Gemma 2, https://arxiv.org/abs/2408.00118); off by default.
        sliding_window: A token sees itself and the ``sliding_window - 1`` tokens before it
            (Mistral, https://arxiv.org/abs/2310.06825); by default all.
        qk_norm: Normalise queries and keys per head before the dot product
            (https://arxiv.org/abs/2302.05442); keeps attention logits bounded.
        position: How the model knows order: ``rotary`` (https://arxiv.org/abs/2104.09864), ``learned`` (GPT-2's table),
            ``sinusoidal`` (https://arxiv.org/abs/1706.03762), ``alibi`` (https://arxiv.org/abs/2108.12409) or ``none``.
        rotary_base: Wavelength base of the rotary angles.
        rotary_share: The part of each head's channels that is turned, the first ones (GPT-NeoX).
        rotary_scaling: Rotary positions for contexts longer than those trained in: ``linear``, ``ntk``, ``llama3``,
            ``yarn`` (see ``model.rotary_scaling``).
        rotary_factor: How many times longer.
        rotary_trained_context: Tokens that the model was trained in; for ``llama3`` and ``yarn``.
        rotary_slow: Pairs of channels with fewer turns in the trained context are slowed by the whole factor; by
            default 1.
        rotary_fast: Pairs with more are left alone; by default 4 for ``llama3`` and 32 for ``yarn``.
        norm: ``rmsnorm`` (https://arxiv.org/abs/1910.07467) or ``layernorm`` (https://arxiv.org/abs/1607.06450).
        norm_eps: What is added to the statistic under the root.
        norm_placement: ``pre`` reads a normalised copy of the stream (GPT-2, Llama), ``post`` normalises the stream
            after each addition (the original Transformer), ``sandwich`` what is read and what is added (Gemma 2).
        bias: Give linear layers and LayerNorms a bias (GPT-2); the head has none.
        feed_forward: ``swiglu``, ``geglu`` (https://arxiv.org/abs/2002.05202), ``relu2``
            (https://arxiv.org/abs/2109.08668), ``gelu`` (GPT-2's), ``gelu_exact`` or ``relu``.
        ffn_dim: Hidden width of the feed-forward part. By default the multiple of 32 nearest to an
            equal number of parameters for each kind: 4 x n_embd, or 8/3 x n_embd for the gated kinds, which
            have a third matrix.
        tied_embeddings: The head's matrix is the embedding's (https://arxiv.org/abs/1608.05859).
        vocab_multiple: Round the rows of embedding and head up to a multiple of this, which some hardware multiplies
            faster; the rows beyond the vocabulary are never predicted.
        logit_softcap: Squash the logits into (-cap, cap) by ``cap * tanh(logits / cap)``
            (Gemma 2, https://arxiv.org/abs/2408.00118); off by default.
        value_embeddings: Give every block a table of its own that adds a learned vector for each token to
            attention's values (modded-nanogpt, after https://arxiv.org/abs/2410.17897).
        bigram_rows: Rows of a table that adds a learned vector for each pair of neighbouring tokens to the
            embedding; pairs share rows by a hash (modded-nanogpt). Off by default.
        smear: Add to every token's embedding a learned share of the one before it (modded-nanogpt).
        residual_scalars: Let every block scale the stream that it reads, and mix in the embedding that the
            stream began with, by two learned numbers (modded-nanogpt).
        dropout: Probability of zeroing, on embeddings, attention weights and what a block adds, as in GPT-2.
        initialisation: ``zero`` starts blocks as the identity and logits at zero, ``gpt2`` and ``normal`` draw from a
            normal distribution of 0.02 (GPT-2, Llama), ``xavier`` as the original Transformer did
            (see ``model.initialisation``).

    Raises:
        UserError: A size is not positive, sizes do not divide each other, a probability is none, or two switches
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
                f"PyTorch's kernel caps nothing: choose auto, manual or flex"
            )
        if self.attention_backend == "flex" and self.dropout:
            raise UserError(
                f"model.gpt.attention_backend is flex, but model.gpt.dropout is {self.dropout}; FlexAttention drops "
                f"nothing: choose auto, sdpa or manual"
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
        """Channels of a head that rotary positions turn."""
        return round(self.head_width * self.rotary_share)

    @property
    def ffn_width(self) -> int:
        """Hidden channels of the feed-forward part, resolved."""
        return self.ffn_dim or max(32, round(FEED_FORWARDS[self.feed_forward].ratio * self.n_embd / 32) * 32)
