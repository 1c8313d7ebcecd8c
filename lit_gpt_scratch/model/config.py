"""``GPTConfig``: all architectural settings of the transformer, as plain data."""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args, get_type_hints

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.feed_forward import FEED_FORWARDS
from lit_gpt_scratch.model.norms import NORM_PLACEMENTS, NORMS
from lit_gpt_scratch.model.positions import POSITION_ENCODINGS, ROTARY_SCALINGS
from lit_gpt_scratch.model.weight_init import INITIALISATIONS

BackendName = Literal["auto", "sdpa", "manual", "flex"]
if TYPE_CHECKING:  # mypy requires literals; at run time the choices (and those in --help) come from the tables
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
    """Architecture of a GPT. Vocabulary size and context length depend on the data and are not set here.

    The defaults are a small Qwen3: rotary positions, RMSNorm, QK-norm, SwiGLU, no biases.

    Args:
        n_layer: Number of transformer blocks.
        n_head: Number of query heads per block.
        n_embd: Width of the residual stream; must be a multiple of ``n_head`` unless ``head_dim`` is set.
        n_kv_head: Number of key/value heads per block: ``n_head`` (the default) is multi-head attention, 1 is
            multi-query attention, a divisor in between is grouped-query attention (https://arxiv.org/abs/2305.13245).
        head_dim: Width of one attention head; ``n_embd // n_head`` by default.
        attention: Import path of your own attention class, such as ``my_file.MyAttention``; it must be a subclass of
            ``model.attention.Attention``.
        attention_backend: Attention implementation: ``sdpa`` (PyTorch's fused kernel), ``manual`` (step by step),
            ``flex`` (FlexAttention) or ``auto``, the fastest that supports the other settings. All compute the same
            function.
        attention_softcap: Bound the attention scores to (-cap, cap) with ``cap * tanh(scores / cap)``
            (Gemma 2, https://arxiv.org/abs/2408.00118); off by default.
        sliding_window: Sliding-window attention: each token attends only to itself and the ``sliding_window - 1``
            preceding tokens (Mistral, https://arxiv.org/abs/2310.06825). By default it attends to all preceding tokens.
        qk_norm: Whether to normalise queries and keys per head before the dot product, which keeps attention logits
            bounded (https://arxiv.org/abs/2302.05442).
        position: Position encoding: ``rotary`` (https://arxiv.org/abs/2104.09864), ``learned`` (GPT-2),
            ``sinusoidal`` (https://arxiv.org/abs/1706.03762), ``alibi`` (https://arxiv.org/abs/2108.12409) or ``none``.
        rotary_base: Base of the rotary wavelengths (``rope_theta``).
        rotary_share: Fraction of each head's channels to rotate, starting with the first (GPT-NeoX).
        rotary_scaling: Method of scaling rotary positions to contexts longer than in training: ``linear``, ``ntk``,
            ``llama3`` or ``yarn`` (see ``model.positions``).
        rotary_factor: Ratio of the extended context length to the context length in training.
        rotary_trained_context: Context length in training, in tokens; required by ``llama3`` and ``yarn``.
        rotary_slow: Channel pairs that make fewer turns than this within the trained context are slowed by the full
            ``rotary_factor``; 1 by default.
        rotary_fast: Channel pairs that make more turns than this within the trained context are not slowed; by default
            4 for ``llama3`` and 32 for ``yarn``.
        norm: Normalisation layer: ``rmsnorm`` (https://arxiv.org/abs/1910.07467) or ``layernorm``
            (https://arxiv.org/abs/1607.06450).
        norm_eps: Epsilon of the normalisation layers, added to the mean square or variance.
        norm_placement: Placement of the normalisation layers: ``pre`` normalises the input of each residual branch
            (GPT-2, Llama), ``post`` the residual stream after each addition (the original Transformer), ``sandwich``
            the input and the output of each branch (Gemma 2).
        bias: Whether linear layers and LayerNorms have biases (GPT-2); the output head never has one.
        feed_forward: Kind of feed-forward network: ``swiglu``, ``geglu`` (https://arxiv.org/abs/2002.05202), ``relu2``
            (https://arxiv.org/abs/2109.08668), ``gelu`` (GPT-2), ``gelu_exact`` or ``relu``.
        ffn_dim: Hidden width of the feed-forward network. By default 4 * n_embd, or 8/3 * n_embd for the gated kinds,
            whose three matrices then have as many parameters as two; rounded to a multiple of 32.
        tied_embeddings: Whether the embedding and the output head share one matrix (https://arxiv.org/abs/1608.05859).
        vocab_multiple: Round the number of rows in the embedding and output head up to a multiple of this, which is
            faster on some hardware; the padding rows are never predicted.
        logit_softcap: Bound the output logits to (-cap, cap) with ``cap * tanh(logits / cap)``
            (Gemma 2, https://arxiv.org/abs/2408.00118); off by default.
        value_embeddings: Whether to add a learned vector per token id to the attention values in every block
            (modded-nanogpt, after https://arxiv.org/abs/2410.17897).
        bigram_rows: Number of rows in a table that adds a learned vector per bigram to the token embedding; bigrams
            are hashed to rows (modded-nanogpt). Off by default.
        smear: Whether to add a learned fraction of the previous token's embedding to each token's embedding
            (modded-nanogpt).
        residual_scalars: Whether every block scales the residual stream by one learned scalar and adds the embeddings
            scaled by another (modded-nanogpt).
        dropout: Dropout probability for embeddings, attention weights and residual branches, as in GPT-2.
        initialisation: Weight initialisation scheme: ``zero`` starts with blocks equal to the identity and with zero
            logits, ``gpt2`` and ``normal`` draw from a normal distribution with standard deviation 0.02 (GPT-2, Llama),
            ``xavier`` is the scheme of the original Transformer (see ``model.weight_init``).

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
                f"set it to a multiple, or set model.gpt.head_dim"
            )
        if self.n_head % self.kv_heads:
            raise UserError(
                f"model.gpt.n_head ({self.n_head}) is not divisible by model.gpt.n_kv_head ({self.n_kv_head}); "
                f"set n_kv_head to a divisor"
            )
        if self.attention_backend == "sdpa" and self.attention_softcap:
            raise UserError(
                f"model.gpt.attention_backend is sdpa, but model.gpt.attention_softcap is {self.attention_softcap}; "
                f"PyTorch's kernel does not support a soft cap: choose auto, manual or flex"
            )
        if self.attention_backend == "flex" and self.dropout:
            raise UserError(
                f"model.gpt.attention_backend is flex, but model.gpt.dropout is {self.dropout}; FlexAttention does "
                f"not support dropout: choose auto, sdpa or manual"
            )
        POSITION_ENCODINGS[self.position].validate(self)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads per block, with the default resolved."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Width of one attention head, with the default resolved."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def rotary_width(self) -> int:
        """Number of rotated channels per head."""
        return round(self.head_width * self.rotary_share)

    @property
    def ffn_width(self) -> int:
        """Hidden width of the feed-forward network, with the default resolved."""
        return self.ffn_dim or max(32, round(FEED_FORWARDS[self.feed_forward].hidden_ratio * self.n_embd / 32) * 32)
