"""Dataclass ``GPTConfig``, which contains all architectural settings of the transformer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, get_type_hints

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.attention_registry import ATTENTIONS, resolve_attention_class
from lit_gpt_scratch.model.feed_forward import FEED_FORWARDS, GATED_FEED_FORWARDS, resolve_feed_forward_class
from lit_gpt_scratch.model.moe import ROUTER_SCORES
from lit_gpt_scratch.model.norms import NORM_PLACEMENTS, NORMS
from lit_gpt_scratch.model.positions import POSITION_ENCODINGS, ROTARY_SCALINGS
from lit_gpt_scratch.model.weight_init import INITIALISATIONS
from lit_gpt_scratch.schema import describe

BackendName = Literal["auto", "sdpa", "manual", "flex"]
ParametrisationName = Literal["standard", "mup"]
if TYPE_CHECKING:  # mypy rejects computed literals; at run time, the choices (also in --help) come from the registries
    AttentionName: TypeAlias = str
    ExpertActivation: TypeAlias = str
    FeedForwardName: TypeAlias = str
    InitialisationName: TypeAlias = str
    NormName: TypeAlias = str
    PlacementName: TypeAlias = str
    PositionName: TypeAlias = str
    RouterScores: TypeAlias = str
    ScalingName: TypeAlias = str
else:
    AttentionName = Literal[tuple(ATTENTIONS)]
    ExpertActivation = Literal[tuple(GATED_FEED_FORWARDS)]
    FeedForwardName = Literal[tuple(FEED_FORWARDS)]
    InitialisationName = Literal[tuple(INITIALISATIONS)]
    NormName, PlacementName = Literal[NORMS], Literal[NORM_PLACEMENTS]
    PositionName = Literal[tuple(POSITION_ENCODINGS)]
    RouterScores = Literal[ROUTER_SCORES]
    ScalingName = Literal[ROTARY_SCALINGS]

MAY_BE_ZERO = (
    "dropout", "n_shared_experts", "expert_bias_rate", "load_balance_loss", "router_z_loss", "multi_token_depth",
)  # fmt: skip
EXPERT_SETTINGS = (
    "n_experts", "experts_per_token", "n_shared_experts", "expert_activation", "router_scores", "normalize_gates",
    "load_balance_loss", "router_z_loss", "expert_bias_rate",
)  # fmt: skip
"""Settings that apply only to mixtures of experts."""
MAX_SIZES = {"n_layer": 10_000, "n_head": 2**16, "n_experts": 2**14, "multi_token_depth": 64}
"""Maximum values of settings that determine how many objects are built; all other integers are at most ``MAX_SIZE``."""
MAX_SIZE = 2**31


def custom_classes(gpt: Mapping[str, Any]) -> dict[str, str]:
    """Return the import paths of the custom classes in the fields of a ``GPTConfig``, keyed by field.

    The classes are not imported. Unlike the names of built-in classes, import paths contain a dot.
    """
    values = {field: gpt.get(field) for field in ("attention", "feed_forward")}
    return {field: value for field, value in values.items() if isinstance(value, str) and "." in value}


@dataclass(frozen=True)
class GPTConfig:
    """Architecture of a GPT. Vocabulary size and context length depend on the data and are not set here.

    The defaults describe a small Qwen3 model: rotary position embeddings, RMSNorm, QK-norm, SwiGLU and no biases.

    Args:
        n_layer: Number of transformer blocks.
        n_head: Number of query heads per block.
        n_embd: Width of the residual stream; must be a multiple of ``n_head`` unless ``head_dim`` is set.
        n_kv_head: Number of key/value heads per block: ``n_head`` (the default) gives multi-head attention, 1 gives
            multi-query attention, and a divisor of ``n_head`` in between gives grouped-query attention
            (https://arxiv.org/abs/2305.13245).
        head_dim: Dimension of each attention head; ``n_embd // n_head`` by default.
        attention: Type of attention: ``latent`` (multi-head latent attention of DeepSeek-V2,
            https://arxiv.org/abs/2405.04434), or the import path of a subclass of ``model.attention.Attention``, such
            as ``my_file.MyAttention``. By default, multi-head, grouped-query or multi-query attention, depending on
            ``n_kv_head``.
        attention_backend: Attention implementation: ``sdpa`` uses PyTorch's fused kernel, ``manual`` computes attention
            step by step, ``flex`` uses FlexAttention, and ``auto`` selects the fastest implementation that supports the
            other settings. All implementations compute the same function.
        attention_scale: Factor by which the dot products of queries and keys are multiplied; by default,
            ``head_dim ** -0.5``. Gemma 2 and 3 use ``query_pre_attn_scalar ** -0.5``.
        attention_softcap: Soft cap for the attention scores, which are bounded to (-cap, cap) with
            ``cap * tanh(scores / cap)`` (Gemma 2, https://arxiv.org/abs/2408.00118). By default, there is no soft cap.
        attention_sinks: Whether the softmax of each head includes a learned logit that belongs to no token, so that
            the attention weights of all tokens may sum to less than 1 (gpt-oss, https://arxiv.org/abs/2508.10925).
        sliding_window: Size of the attention window in tokens: each token attends only to itself and the
            ``sliding_window - 1`` preceding tokens (Mistral, https://arxiv.org/abs/2310.06825). By default, each token
            attends to all preceding tokens.
        sliding_window_pattern: Every ``sliding_window_pattern``-th block is global, that is, attends to all preceding
            tokens in spite of ``sliding_window``; the others are local (6 in Gemma 3, https://arxiv.org/abs/2503.19786;
            2 in Gemma 2 and gpt-oss). By default, ``sliding_window`` applies to all blocks.
        latent_kv_rank: For latent attention, the width of the vector from which the keys and values of a token are
            computed; 4 * head_dim by default. The KV cache stores ``latent_kv_rank + latent_rope_dim`` elements per
            token and block.
        latent_query_rank: For latent attention, the width of the vector from which the queries of a token are computed.
            By default, queries are computed from the residual stream directly.
        latent_rope_dim: For latent attention, the number of channels per head to which the position encoding is
            applied; queries and keys have them in addition to their ``head_dim`` other channels. About head_dim / 2 by
            default.
        latent_value_dim: For latent attention, the dimension of the values of each head; ``head_dim`` by default.
        qk_norm: Whether to apply RMSNorm to the queries and keys of each head before the dot product, which keeps
            attention scores bounded (https://arxiv.org/abs/2302.05442). With latent attention, it is applied to the
            vectors from which queries, keys and values are computed instead.
        qk_norm_joint: Whether this norm covers the channels of all heads together, instead of those of each head (OLMo
            2, https://arxiv.org/abs/2501.00656).
        position: Position encoding: ``rotary`` (https://arxiv.org/abs/2104.09864), ``learned`` (GPT-2),
            ``sinusoidal`` (https://arxiv.org/abs/1706.03762), ``alibi`` (https://arxiv.org/abs/2108.12409) or ``none``.
        rotary_base: Base of the rotation frequencies of the rotary position embeddings, called ``rope_theta`` in
            Hugging Face configs.
        rotary_local_base: Base of the rotation frequencies in local blocks (see ``sliding_window_pattern``), which are
            not scaled by ``rotary_scaling`` (Gemma 3, which calls it ``rope_local_base_freq``). By default, local
            blocks use the frequencies of global blocks.
        rotary_share: Fraction of each head's channels that are rotated, starting with the first channel (GPT-NeoX).
        rotary_skip_every: Every ``rotary_skip_every``-th block does not rotate its queries and keys (SmolLM3 with 4;
            https://arxiv.org/abs/2501.18795). By default, all blocks do.
        rotary_scaling: Method for extending rotary position embeddings beyond the original context length: ``linear``,
            ``ntk``, ``llama3``, ``yarn``, ``dynamic`` or ``longrope`` (see ``model.positions``). By default, the
            frequencies are not scaled. With ``dynamic`` and ``longrope``, the frequencies depend on the length of the
            text; when they change during generation, the text is encoded again, at each token with ``dynamic``.
        rotary_factor: Ratio of the extended context length to the original context length.
        rotary_trained_context: Original context length in tokens, with which the model was trained before the
            extension; required for ``llama3``, ``yarn``, ``dynamic`` and ``longrope``.
        rotary_slow: For ``llama3`` and ``yarn``, the number of rotations over the original context length
            (``rotary_trained_context``) below which the frequency of a channel pair is divided by ``rotary_factor``;
            1 by default. Hugging Face configs call it ``low_freq_factor`` (``llama3``) or ``beta_slow`` (``yarn``).
        rotary_fast: For ``llama3`` and ``yarn``, the number of rotations over the original context length above which
            the frequency of a channel pair is not changed; by default, 4 for ``llama3`` and 32 for ``yarn``. Hugging
            Face configs call it ``high_freq_factor`` (``llama3``) or ``beta_fast`` (``yarn``).
        rotary_truncate: For ``yarn``, whether the fractional indices of the channel pairs that make ``rotary_slow`` and
            ``rotary_fast`` rotations are rounded outwards to integers; false in gpt-oss.
        rotary_short_factors: For ``longrope``, the divisor of the frequency of each channel pair in texts up to the
            original context length (``rotary_trained_context``).
        rotary_long_factors: For ``longrope``, the same for longer texts.
        norm: Type of normalization layer: ``rmsnorm`` (https://arxiv.org/abs/1910.07467), ``zero_centered_rmsnorm``
            (the same with gains stored as differences from one, as in Gemma) or ``layernorm``
            (https://arxiv.org/abs/1607.06450). ``qk_norm`` uses the same type of RMSNorm.
        norm_eps: Value added to the mean square or variance in normalization layers for numerical stability.
        norm_placement: Placement of the normalization layers: ``pre`` normalizes the input of each residual branch
            (GPT-2, Llama), ``post`` normalizes the residual stream after each addition (the original Transformer),
            ``output`` normalizes the output of each residual branch (OLMo 2), and ``sandwich`` normalizes both its
            input and its output (Gemma 2).
        bias: Whether the linear layers of the blocks, including experts and routers, and all LayerNorms have biases,
            as in GPT-2 and gpt-oss. The output head never has a bias.
        qkv_bias: Whether the projections to queries, keys and values have biases even if ``bias`` is false (Qwen2,
            https://arxiv.org/abs/2407.10671).
        feed_forward: Type of feed-forward network: ``swiglu``, ``geglu`` (https://arxiv.org/abs/2002.05202),
            ``clamped_swiglu`` (gpt-oss, https://arxiv.org/abs/2508.10925), ``relu2``
            (https://arxiv.org/abs/2109.08668), ``gelu`` (tanh approximation, as in GPT-2), ``gelu_exact``, ``relu``,
            ``moe``, a mixture of experts (Mixtral, https://arxiv.org/abs/2401.04088), or the import path of a subclass
            of ``model.feed_forward.FeedForward``, such as ``my_file.MyFeedForward``.
        ffn_dim: Hidden width of the feed-forward network, or of each expert. By default, 4 * n_embd, or 8/3 * n_embd
            for gated types (``swiglu``, ``geglu``, ``clamped_swiglu``), rounded to a multiple of 32. The three matrices
            of the gated types then have about as many parameters as the two matrices of the other types. For ``moe``,
            the default is 8/3 * n_embd divided by the number of experts that a token uses.
        n_experts: Number of experts among which the router of ``moe`` chooses.
        experts_per_token: Number of experts that the router chooses for each token.
        n_shared_experts: Number of additional experts that all tokens use (DeepSeekMoE,
            https://arxiv.org/abs/2401.06066).
        expert_activation: Activation of the experts of ``moe``: ``swiglu``, ``geglu`` or ``clamped_swiglu``, as in the
            feed-forward networks of these types.
        router_scores: Function that turns the router's logits into scores: ``softmax`` (Mixtral, Qwen3) or ``sigmoid``
            (DeepSeek-V3).
        normalize_gates: Whether the scores of a token's experts, by which their outputs are multiplied, are divided by
            their sum.
        load_balance_loss: Coefficient of the loss that balances the load of the experts of each block (see
            ``model.moe``); 0 disables it.
        router_z_loss: Coefficient of the loss that keeps the router's logits small, such as 0.001 (ST-MoE,
            https://arxiv.org/abs/2202.08906); 0 disables it.
        expert_bias_rate: If set, such as to 0.001, a bias is added to the score of each expert when experts are chosen,
            and after each step it is increased by this value for experts with less than the mean load and decreased for
            the others (DeepSeek-V3, https://arxiv.org/abs/2408.15664). ``load_balance_loss`` can then be 0.
        tied_embeddings: Whether the token embedding and the output head share the same weight matrix
            (https://arxiv.org/abs/1608.05859).
        scaled_embeddings: Whether to multiply the token embeddings by the square root of ``n_embd`` (the original
            Transformer, Gemma).
        vocab_multiple: The number of rows in the token embedding and the output head is rounded up to a multiple of
            this value, which is faster on some hardware. The additional rows do not correspond to any token
            and are never predicted.
        logit_softcap: Soft cap for the output logits, which are bounded to (-cap, cap) with
            ``cap * tanh(logits / cap)`` (Gemma 2, https://arxiv.org/abs/2408.00118). By default, there is no soft cap.
        value_embeddings: Whether to add a learned vector for each token id to the attention values in every block
            (modded-nanogpt, based on https://arxiv.org/abs/2410.17897).
        bigram_rows: Number of rows in the hash table of bigram embeddings, which are added to the token embeddings
            (modded-nanogpt). By default, there are no bigram embeddings.
        smear: Whether to add a learned fraction of the previous token's embedding to each token's embedding
            (modded-nanogpt).
        residual_scalars: Whether each block first multiplies the residual stream by a learned scalar and adds the input
            embeddings multiplied by a second learned scalar (modded-nanogpt).
        multi_token_depth: Number of modules that predict tokens further ahead in training, each one token further than
            the module before (multi-token prediction of DeepSeek-V3, https://arxiv.org/abs/2412.19437). The text
            generated by the model does not depend on them.
        dropout: Dropout probability for embeddings, attention weights and residual branches, as in GPT-2; 0 disables
            dropout.
        initialisation: Weight initialization scheme: ``zero`` makes residual branches and an untied output head
            initially output zero, ``gpt2`` and ``normal`` draw weights from a normal distribution with a standard
            deviation of 0.02 (GPT-2, Llama), and ``xavier`` is the scheme of the original Transformer (see
            ``model.weight_init``).
        parametrisation: Scaling of initial weights, attention scores, tied logits and AdamW's hyperparameters with
            ``n_embd``: ``standard`` uses the same hyperparameters at each width; ``mup`` (maximal update
            parametrization, https://arxiv.org/abs/2203.03466) changes them such that activations and their updates
            have the same scale at each width, so that a learning rate tuned at ``mup_base_width`` also suits wider
            models. At this width, both are identical. ``n_head``, ``n_kv_head`` and ``ffn_dim`` must grow in
            proportion to ``n_embd``.
        mup_base_width: Value of ``n_embd`` in the model for which the hyperparameters were tuned; required for ``mup``.
        mup_base_head_dim: Head dimension of that model. By default, it is the head dimension of this model, i.e. wider
            models have more heads rather than larger ones.

    Raises:
        UserError: A size is not positive, a size is not divisible as required, a probability is out of range, or two
            settings contradict each other.
    """

    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 192
    n_kv_head: int | None = None
    head_dim: int | None = None
    attention: AttentionName | str | None = None
    attention_backend: BackendName = "auto"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    attention_sinks: bool = False
    sliding_window: int | None = None
    sliding_window_pattern: int | None = None
    latent_kv_rank: int | None = None
    latent_query_rank: int | None = None
    latent_rope_dim: int | None = None
    latent_value_dim: int | None = None
    qk_norm: bool = True
    qk_norm_joint: bool = False
    position: PositionName = "rotary"
    rotary_base: float = 10_000.0
    rotary_local_base: float | None = None
    rotary_share: float = 1.0
    rotary_skip_every: int | None = None
    rotary_scaling: ScalingName | None = None
    rotary_factor: float = 1.0
    rotary_trained_context: int | None = None
    rotary_slow: float | None = None
    rotary_fast: float | None = None
    rotary_truncate: bool = True
    rotary_short_factors: tuple[float, ...] | None = None
    rotary_long_factors: tuple[float, ...] | None = None
    norm: NormName = "rmsnorm"
    norm_eps: float = 1e-6
    norm_placement: PlacementName = "pre"
    bias: bool = False
    qkv_bias: bool = False
    feed_forward: FeedForwardName | str = "swiglu"
    ffn_dim: int | None = None
    n_experts: int = 8
    experts_per_token: int = 2
    n_shared_experts: int = 0
    expert_activation: ExpertActivation = "swiglu"
    router_scores: RouterScores = "softmax"
    normalize_gates: bool = True
    load_balance_loss: float = 0.01
    router_z_loss: float = 0.0
    expert_bias_rate: float | None = None
    tied_embeddings: bool = False
    scaled_embeddings: bool = False
    vocab_multiple: int = 1
    logit_softcap: float | None = None
    value_embeddings: bool = False
    bigram_rows: int | None = None
    smear: bool = False
    residual_scalars: bool = False
    multi_token_depth: int = 0
    dropout: float = 0.0
    initialisation: InitialisationName = "zero"
    parametrisation: ParametrisationName = "standard"
    mup_base_width: int | None = None
    mup_base_head_dim: int | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(GPTConfig)
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(hints[field.name])
            if isinstance(value, str) and field.name not in self.custom_classes:
                named = [c for choice in choices for c in (get_args(choice) or [choice]) if isinstance(c, str)]
                if value not in named:
                    import_path = ", or an import path such as my_file.MyClass" if str in choices else ""
                    raise UserError(
                        f"model.gpt.{field.name} is {value}; it must be one of {', '.join(named)}{import_path}"
                    )
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and field.name not in MAY_BE_ZERO and not 0 < value < math.inf:
                bound = "finite" if value == math.inf else "positive"
                raise UserError(f"model.gpt.{field.name} is {value}; it must be {bound}")
            if number and isinstance(value, int) and value > (largest := MAX_SIZES.get(field.name, MAX_SIZE)):
                raise UserError(f"model.gpt.{field.name} is {describe(value)}; it must be at most {largest}")
        for name in MAY_BE_ZERO:
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise UserError(f"model.gpt.{name} is {getattr(self, name)}; it must be 0 or more, and finite")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.gpt.dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(
                f"model.gpt.n_embd ({self.n_embd}) is not divisible by model.gpt.n_head ({self.n_head}); "
                f"set n_embd to a multiple of n_head, or set model.gpt.head_dim"
            )
        if self.n_head % self.kv_heads:
            raise UserError(
                f"model.gpt.n_head ({self.n_head}) is not divisible by model.gpt.n_kv_head ({self.n_kv_head}); "
                f"set n_kv_head to a divisor of n_head"
            )
        if self.attention_backend == "sdpa" and self.attention_softcap:
            raise UserError(
                f"model.gpt.attention_backend is sdpa, which does not support a soft cap, but "
                f"model.gpt.attention_softcap is {self.attention_softcap}; choose auto, manual or flex"
            )
        if self.attention_backend == "flex" and self.dropout:
            raise UserError(
                f"model.gpt.attention_backend is flex, which does not support dropout, but "
                f"model.gpt.dropout is {self.dropout}; choose auto, sdpa or manual"
            )
        self._validate_experts()
        self._validate_sliding_window_pattern()
        if self.qk_norm_joint and not self.qk_norm:
            raise UserError(
                "model.gpt.qk_norm_joint is true, but model.gpt.qk_norm is false; set qk_norm to true, or set "
                "qk_norm_joint to false"
            )
        if self.parametrisation == "mup" and self.mup_base_width is None:
            raise UserError(
                "model.gpt.parametrisation is mup, but model.gpt.mup_base_width is not set; set it to the n_embd of "
                "the model for which the learning rate was tuned"
            )
        if self.parametrisation == "mup" and self.scaled_embeddings:
            raise UserError(
                "model.gpt.scaled_embeddings is true, with which embeddings grow with the width, but "
                "model.gpt.parametrisation is mup; set one of them to its default"
            )
        for name in ("mup_base_width", "mup_base_head_dim"):
            if self.parametrisation != "mup" and (value := getattr(self, name)) is not None:
                raise UserError(
                    f"model.gpt.{name} is {value}, but model.gpt.parametrisation is {self.parametrisation}; "
                    f"set parametrisation to mup, or remove {name}"
                )
        if "attention" not in self.custom_classes:  # which are imported, and validated, when the network is built
            resolve_attention_class(self.attention).validate(self)
        POSITION_ENCODINGS[self.position].validate(self)

    def _validate_experts(self) -> None:
        if self.feed_forward != "moe" and "feed_forward" not in self.custom_classes:  # a custom class may use them
            for name in EXPERT_SETTINGS:
                if (value := getattr(self, name)) != getattr(GPTConfig, name):  # the default
                    raise UserError(
                        f"model.gpt.{name} is {value}, but model.gpt.feed_forward is {self.feed_forward}; "
                        f"set feed_forward to moe, or remove {name}"
                    )
        if self.experts_per_token > self.n_experts:
            raise UserError(
                f"model.gpt.experts_per_token is {self.experts_per_token}, but model.gpt.n_experts is "
                f"{self.n_experts}; lower experts_per_token, or raise n_experts"
            )
        if self.feed_forward == "moe" and self.experts_per_token == 1 and self.normalize_gates:
            raise UserError(
                "model.gpt.experts_per_token is 1, for which model.gpt.normalize_gates makes every gate 1, so that the "
                "router is not trained; set normalize_gates to false"
            )

    def _validate_sliding_window_pattern(self) -> None:
        every = self.sliding_window_pattern
        if every is None:
            return
        if self.sliding_window is None:
            raise UserError(
                f"model.gpt.sliding_window_pattern is {every}, but model.gpt.sliding_window is not set; set "
                f"sliding_window, or remove sliding_window_pattern"
            )
        if every == 1:
            raise UserError(
                "model.gpt.sliding_window_pattern is 1, so no block would use model.gpt.sliding_window; choose a "
                "pattern of at least 2, or remove both"
            )
        if every > self.n_layer:
            raise UserError(
                f"model.gpt.sliding_window_pattern is {every}, but model.gpt.n_layer is {self.n_layer}, so no block "
                f"would be global; choose a pattern of at most {self.n_layer}, or remove it"
            )

    def is_local(self, layer: int) -> bool:
        """Return whether a block attends only to the tokens in ``sliding_window``.

        Args:
            layer: Index of the block, counted from 0.
        """
        every = self.sliding_window_pattern
        return self.sliding_window is not None and (every is None or (layer + 1) % every != 0)

    def resized(self, n_layer: int) -> "GPTConfig":
        """Return the config of a model with another number of blocks, which have the same parameters.

        Parameters do not depend on ``sliding_window_pattern``, which requires enough blocks and is removed.
        """
        return replace(self, n_layer=n_layer, sliding_window_pattern=None, rotary_local_base=None)

    @property
    def custom_classes(self) -> dict[str, str]:
        """Import paths of the custom classes that this config uses, keyed by field."""
        return custom_classes(vars(self))

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads per block: ``n_kv_head``, or ``n_head`` if ``n_kv_head`` is None."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Dimension of each attention head: ``head_dim``, or ``n_embd // n_head`` if ``head_dim`` is None."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def latent_kv_width(self) -> int:
        """Width of the compressed keys and values of latent attention: ``latent_kv_rank`` or its default."""
        return self.latent_kv_rank or 4 * self.head_width

    @property
    def latent_rope_width(self) -> int:
        """Number of position channels per head of latent attention: ``latent_rope_dim`` or its (even) default."""
        return self.latent_rope_dim or max(2, self.head_width // 4 * 2)

    @property
    def latent_value_width(self) -> int:
        """Dimension of the values of each head of latent attention: ``latent_value_dim`` or its default."""
        return self.latent_value_dim or self.head_width

    @property
    def positional_width(self) -> int:
        """Number of channels per head to which the position encoding is applied: all except in latent attention."""
        latents = self.latent_kv_rank, self.latent_query_rank, self.latent_rope_dim, self.latent_value_dim
        is_latent = self.attention == "latent" or any(latents)
        return self.latent_rope_width if is_latent else self.head_width

    @property
    def rotary_width(self) -> int:
        """Number of rotated channels per head."""
        return round(self.positional_width * self.rotary_share)

    @property
    def ffn_width(self) -> int:
        """Hidden width of the feed-forward network: ``ffn_dim``, or its default value if ``ffn_dim`` is None."""
        return self.ffn_dim or resolve_feed_forward_class(self.feed_forward).default_hidden_dim(self)

    @property
    def width_multiplier(self) -> float:
        """Width relative to the model for which the hyperparameters were tuned; 1 in the standard parametrization."""
        return self.n_embd / (self.mup_base_width or self.n_embd)

    @property
    def query_multiplier(self) -> float:
        """Factor for queries, with which attention scores scale with 1 / head_dim instead of 1 / sqrt(head_dim).

        Queries and keys become aligned in training, so that their dot products grow in proportion to ``head_dim``.
        """
        return math.sqrt((self.mup_base_head_dim or self.head_width) / self.head_width)

    @property
    def logit_multiplier(self) -> float:
        """Factor for logits: 1 / ``width_multiplier`` if the head is tied to the embedding, otherwise 1.

        An untied head has smaller initial weights and updates instead.
        """
        return 1 / self.width_multiplier if self.tied_embeddings else 1.0

    def at_width(self, n_embd: int) -> "GPTConfig":
        """Return the config of a model of another width.

        The head dimension, the number of query heads per key/value head and the ratio of the hidden width of the
        feed-forward network to ``n_embd`` are those of this config.

        Raises:
            UserError: The width does not contain a whole number of heads.
        """
        n_kv_head, rest = divmod(n_embd * self.kv_heads, self.n_embd)
        if rest or not n_kv_head:
            raise UserError(
                f"a width of {n_embd} channels is not divisible by {self.n_embd // self.kv_heads}, the number of "
                f"channels per key/value head of this model; choose another width"
            )
        return replace(
            self,
            n_embd=n_embd,
            n_head=n_kv_head * (self.n_head // self.kv_heads),
            n_kv_head=n_kv_head,
            head_dim=self.head_width,
            ffn_dim=round(self.ffn_width * n_embd / self.n_embd),
        )
