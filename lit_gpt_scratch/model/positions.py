"""Position encodings. To add another, subclass ``PositionEncoding`` and add the class to ``POSITION_ENCODINGS``."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.weight_init import INIT_STD
from lit_gpt_scratch.model.weight_sampler import WeightSampler

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig

ROTARY_SCALINGS: Final = ("linear", "ntk", "llama3", "yarn", "dynamic", "longrope")
SCALINGS_BY_LENGTH: Final = ("dynamic", "longrope")
"""Scalings whose frequencies depend on the length of the text, and not only on the model."""
SCALINGS_FROM_TRAINED_CONTEXT: Final = ("llama3", "yarn", *SCALINGS_BY_LENGTH)
"""Scalings that require ``rotary_trained_context``."""
SHARPENING_SCALINGS: Final = ("yarn", "longrope")
"""Scalings that also scale up attention scores, by multiplying the cosines and sines by a factor."""
DEFAULT_ROTARY_SLOW: Final = 1.0
DEFAULT_ROTARY_FAST: Final = {"llama3": 4.0, "yarn": 32.0}
"""Default values of ``rotary_slow`` and ``rotary_fast``, in rotations over the original context length."""


class PositionEncoding(nn.Module):
    """Base class of position encodings. The base class itself implements ``none``, which does not encode positions.

    Subclasses add vectors to the embeddings (``embed``), rotate queries and keys (``rotate``), or add a bias to the
    attention scores (``score_bias``). Even without an encoding, the causal mask provides some information about token
    order. The argument ``positions`` is an int64 tensor of shape (B, T), or (T,) if all rows have the same positions.
    """

    has_score_bias: bool = False
    """Whether the encoding defines ``score_bias``."""
    embeds_positions: bool = False
    """Whether the encoding defines ``embed``; all keys and values of a token then depend on its position."""

    def __init__(self, config: "GPTConfig", block_size: int) -> None:
        super().__init__()
        self.config = config
        self.block_size = block_size
        self.init_buffers()

    def init_buffers(self) -> None:
        """Compute the tables of the encoding and register them as buffers that are not saved in checkpoints."""

    @staticmethod
    def validate(config: "GPTConfig") -> None:
        """Check that a config is compatible with the position encoding.

        Raises:
            UserError: Two settings contradict each other.
        """
        unset = dict.fromkeys(
            ("local_base", "skip_every", "scaling", "trained_context", "slow", "fast", "short_factors", "long_factors")
        )
        for name, default in {"share": 1.0, "factor": 1.0, "truncate": True, **unset}.items():
            if (value := getattr(config, f"rotary_{name}")) != default:
                raise UserError(
                    f"model.gpt.rotary_{name} is {value}, but model.gpt.position is {config.position}; "
                    f"set model.gpt.position to rotary, or remove rotary_{name}"
                )

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add position embeddings to token embeddings of shape (B, T, n_embd)."""
        return x

    def cos_sin(
        self, positions: Tensor, lengths: Sequence[int], is_local: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """Return the cosines and sines for ``rotate``, computed once for all local or all global blocks.

        Args:
            positions: Positions of the queries or keys.
            lengths: Number of tokens in each row, including cached tokens, or one number if all rows have the same. In
                a padded batch without a cache, this is the length of the padded rows.
            is_local: Whether they are those of local blocks (see ``GPTConfig.is_local``).

        Returns:
            Cosines and sines, or None if nothing is rotated.
        """
        return None

    def changes_at(self, length: int) -> bool:
        """Return whether cached keys and values become invalid when a text grows to a length.

        This is the case if its positions are encoded in another way than those of a text that is one token shorter.
        """
        return False

    def rotate(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rotate queries or keys of shape (B, H, T, head_dim) by their positions; None leaves them unchanged."""
        return x

    def scale(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
        """Multiply queries of shape (B, H, T, width) by the factor by which ``rotate`` scales attention scores.

        For channels that are not rotated, but belong to the same scores. The factor is 1 except with ``yarn`` and
        ``longrope``.
        """
        return x

    def score_bias(self, head: Tensor, distance: Tensor) -> Tensor:
        """Return the bias to add to the attention scores; the arguments are broadcast against each other.

        Args:
            head: Head indices, int64.
            distance: Query-key distances in tokens, int64.
        """
        raise NotImplementedError


class LearnedPositions(PositionEncoding):
    """Learned position embeddings, added to the token embeddings (GPT-2)."""

    embeds_positions = True

    def __init__(self, config: "GPTConfig", block_size: int) -> None:
        super().__init__(config, block_size)
        self.table = nn.Embedding(block_size, config.n_embd)

    def init_weights(self, sampler: WeightSampler) -> None:
        """Initialize the position embeddings as in GPT-2."""
        sampler.normal_(self.table.weight, INIT_STD)

    @override
    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = x + self.table(positions)
        return out


class SinusoidalPositions(PositionEncoding):
    """Fixed sinusoidal embeddings, added to the token embeddings (https://arxiv.org/abs/1706.03762, section 3.5).

    Channel 2i is the sine and channel 2i + 1 the cosine of ``position / 10000 ** (2i / n_embd)``.
    """

    embeds_positions = True
    table: Tensor

    @override
    def init_buffers(self) -> None:
        n_embd = self.config.n_embd
        even = torch.arange(0, n_embd, 2, dtype=torch.float32)  # (n_embd / 2,)
        position = torch.arange(self.block_size, dtype=torch.float32)
        angle = torch.outer(position, 10_000.0 ** (-even / n_embd))  # (T, n_embd / 2)
        table = torch.stack((angle.sin(), angle.cos()), dim=-1).view(self.block_size, n_embd)
        self.register_buffer("table", table, persistent=False)

    @staticmethod
    @override
    def validate(config: "GPTConfig") -> None:
        PositionEncoding.validate(config)
        if config.n_embd % 2:
            raise UserError(
                f"model.gpt.n_embd is {config.n_embd}, but model.gpt.position is sinusoidal, which requires an even "
                f"number; set n_embd to an even number, or choose another position encoding"
            )

    @override
    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table[positions].type_as(x)


class RotaryPositions(PositionEncoding):
    """Rotary position embedding (RoPE, https://arxiv.org/abs/2104.09864) in the half-split layout of Llama and Qwen.

    Channel ``i`` of the first half is paired with channel ``i`` of the second half; at position ``t`` the pair is
    rotated by the angle ``t * base ** (-2i / head_dim)``. The dot product of a rotated query and a rotated key depends
    on their positions only through their distance. If ``rotary_share`` is below 1, only the first channels are rotated
    (GPT-NeoX).
    """

    cos: Tensor
    sin: Tensor
    local_cos: Tensor
    local_sin: Tensor

    @override
    def init_buffers(self) -> None:
        self.width = self.config.rotary_width
        positions, tables = torch.arange(self.block_size), dict[str, tuple[Tensor, Tensor]]()
        if self.config.rotary_scaling not in SCALINGS_BY_LENGTH:
            tables[""] = self._scaled_cos_sin(positions, [self.block_size])
        if (local_base := self.config.rotary_local_base) is not None:
            tables["local_"] = _cos_sin(positions, unscaled_frequencies(local_base, self.width)[None])
        for blocks, (cos, sin) in tables.items():
            self.register_buffer(f"{blocks}cos", cos[0], persistent=False)  # (T, width)
            self.register_buffer(f"{blocks}sin", sin[0], persistent=False)  # (T, width)

    def _scaled_cos_sin(self, positions: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        frequencies, factors = zip(*(rotary_frequencies(self.config, self.width, n) for n in lengths), strict=True)
        return _cos_sin(positions, torch.stack(frequencies).to(positions.device), factors[0])

    @staticmethod
    @override
    def validate(config: "GPTConfig") -> None:
        if config.rotary_width % 2 or not 0 < config.rotary_width <= config.positional_width:
            raise UserError(
                f"model.gpt.position is rotary, which requires an even number of rotated channels from 2 to the head "
                f"dimension, but {config.rotary_width} of {config.positional_width} channels would be rotated; choose "
                f"another model.gpt.head_dim, rotary_share or position"
            )
        validate_rotary_scaling(config)

    @override
    def cos_sin(self, positions: Tensor, lengths: Sequence[int], is_local: bool = False) -> tuple[Tensor, Tensor]:
        if is_local and self.config.rotary_local_base is not None:
            cos, sin = self.local_cos[positions], self.local_sin[positions]
        elif self.config.rotary_scaling in SCALINGS_BY_LENGTH:
            cos, sin = self._scaled_cos_sin(positions, lengths)
        else:
            cos, sin = self.cos[positions], self.sin[positions]
        return cos.unsqueeze(-3), sin.unsqueeze(-3)  # (1, T, width) or (1 or B, 1, T, width)

    @override
    def changes_at(self, length: int) -> bool:
        trained = self.config.rotary_trained_context
        if self.config.rotary_scaling == "longrope":
            return length - 1 == trained
        return self.config.rotary_scaling == "dynamic" and trained is not None and length > trained

    @override
    def rotate(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
        if cos_sin is None:
            return x
        cos, sin = cos_sin
        # Computed in at least float32, the tables' dtype, so that gradients are accumulated in float32, too.
        rotated = x[..., : self.width].to(torch.promote_types(x.dtype, cos.dtype))  # (B, H, T, width)
        rotated = rotated * cos + rotated.roll(self.width // 2, dims=-1) * sin
        rotated = rotated.type_as(x)
        return rotated if self.width == x.size(-1) else torch.cat((rotated, x[..., self.width :]), dim=-1)

    @override
    def scale(self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None) -> Tensor:
        if cos_sin is None or self.config.rotary_scaling not in SHARPENING_SCALINGS:
            return x
        cos, sin = cos_sin
        return (x * (cos[..., :1].square() + sin[..., :1].square())).type_as(x)  # squared factor of cos and sin


def rotary_frequencies(config: "GPTConfig", width: int, length: int = 0) -> tuple[Tensor, float]:
    """Return the rotation angle per position for each channel pair, with ``config.rotary_scaling`` applied.

    - ``linear``: all frequencies are divided by ``rotary_factor`` (https://arxiv.org/abs/2306.15595).
    - ``ntk``: the base is changed so that the lowest frequency is divided by ``rotary_factor`` and the highest
      frequency is unchanged (NTK-aware, https://arxiv.org/abs/2309.00071, section 3.1).
    - ``llama3``: the frequencies of pairs that make fewer than ``rotary_slow`` rotations over the original context
      length (``rotary_trained_context``) are divided by ``rotary_factor``, the frequencies of pairs that make more than
      ``rotary_fast`` rotations are unchanged, and the scale of the frequencies in between is interpolated linearly in
      the number of rotations (Llama 3.1). In Hugging Face configs, ``rotary_slow`` is called ``low_freq_factor`` and
      ``rotary_fast`` is called ``high_freq_factor``.
    - ``yarn``: like ``llama3``, but the scale is interpolated linearly in the index of the pair, between indices that
      are integers if ``rotary_truncate`` is true, and attention logits are scaled up
      (https://arxiv.org/abs/2309.00071, sections 3.2 and 3.4). In Hugging Face configs, ``rotary_slow`` is called
      ``beta_slow`` and ``rotary_fast`` is called ``beta_fast``.
    - ``dynamic``: like ``ntk``, for texts that exceed the original context length only: for a text of
      ``rotary_factor`` times that length, the lowest frequency is divided by ``rotary_factor ** 2 - rotary_factor + 1``
      (Transformers).
    - ``longrope``: the frequency of each pair is divided by its own factor: that in ``rotary_short_factors`` for texts
      up to the original context length, and that in ``rotary_long_factors`` for longer texts. Attention logits are
      scaled up for all texts (https://arxiv.org/abs/2402.13753).

    Args:
        config: The architecture.
        width: Number of rotated channels per head.
        length: Number of tokens in the text; used only by the ``SCALINGS_BY_LENGTH``.

    Returns:
        The frequencies in radians per position, (width / 2,) float32, and a factor by which the cosines and sines are
        multiplied.
    """
    plain = unscaled_frequencies(config.rotary_base, width)
    kind, factor = config.rotary_scaling, config.rotary_factor
    if kind is None:
        return plain, 1.0
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "ntk":
        return unscaled_frequencies(config.rotary_base * factor ** (width / (width - 2)), width), 1.0
    trained = config.rotary_trained_context
    assert trained is not None
    if kind == "dynamic":
        stretch = factor * max(length, trained) / trained - (factor - 1)
        return unscaled_frequencies(config.rotary_base * stretch ** (width / (width - 2)), width), 1.0
    if kind == "longrope":
        divisors = torch.tensor(config.rotary_long_factors if length > trained else config.rotary_short_factors)
        sharpening = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
        return unscaled_frequencies(config.rotary_base, width, divisors), sharpening
    slow, fast = _turn_thresholds(config)
    if kind == "llama3":
        turns = trained * plain / (2 * math.pi)
        kept = ((turns - slow) / (fast - slow)).clamp(0, 1)  # (width / 2,), weight of the unscaled frequency
        return plain * kept + plain / factor * (1 - kept), 1.0

    def pair_index(turns: float) -> float:
        """Return the fractional index of the pair that makes ``turns`` rotations over the original context length."""
        wavelength = trained / turns / (2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(config.rotary_base))

    first, last = pair_index(fast), pair_index(slow)
    if config.rotary_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    slowed = ((torch.arange(width // 2) - first) / max(last - first, 0.001)).clamp(0, 1)  # (width / 2,)
    sharpening = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return plain * (1 - slowed) + plain / factor * slowed, sharpening


def unscaled_frequencies(base: float, width: int, divisors: Tensor | float = 1.0) -> Tensor:
    """Return the rotation angle per position for each pair of ``width`` channels: (width / 2,) float32.

    Args:
        base: Base of the frequencies.
        width: Number of rotated channels.
        divisors: Numbers by which the frequencies are divided, of shape (width / 2,).
    """
    even = torch.arange(0, width, 2, dtype=torch.float32)  # (width / 2,)
    return 1.0 / (divisors * base ** (even / width))  # the published order of operations, for identical rounding


def _cos_sin(positions: Tensor, frequency: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the cosines and signed sines of rotations, multiplied by a factor, for ``rotate``.

    Args:
        positions: Positions, of shape (T,) or (B, T).
        frequency: Angle per position for each pair of channels, of shape (1 or B, width / 2).
        factor: Factor of the cosines and sines.

    Returns:
        Two tensors of shape (1 or B, T, width).
    """
    angle = positions[..., None].float() * frequency[:, None]  # (1 or B, T, width / 2)
    cos, sin = factor * angle.cos(), factor * angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def validate_rotary_scaling(config: "GPTConfig") -> None:
    """Check the ``rotary_*`` settings.

    Raises:
        UserError: A value is out of range, or two settings contradict each other.
    """
    kind, trained = config.rotary_scaling, config.rotary_trained_context
    for name, base in (("rotary_base", config.rotary_base), ("rotary_local_base", config.rotary_local_base)):
        if base is not None and base <= 1:
            raise UserError(f"model.gpt.{name} is {base}; it must be greater than 1")
    if config.rotary_local_base is not None and config.sliding_window_pattern is None:
        raise UserError(
            f"model.gpt.rotary_local_base is {config.rotary_local_base}, but model.gpt.sliding_window_pattern is not "
            f"set; set sliding_window_pattern, or set rotary_base instead"
        )
    if kind is None and config.rotary_factor != 1:
        raise UserError(
            f"model.gpt.rotary_factor is {config.rotary_factor}, but model.gpt.rotary_scaling is not set; "
            f"set rotary_scaling to one of {', '.join(ROTARY_SCALINGS)}"
        )
    has_turns = kind in DEFAULT_ROTARY_FAST
    if (kind in SCALINGS_FROM_TRAINED_CONTEXT) != (trained is not None):
        *others, last = SCALINGS_FROM_TRAINED_CONTEXT
        raise UserError(
            f"model.gpt.rotary_scaling is {kind}, but model.gpt.rotary_trained_context is {trained}; "
            f"set rotary_trained_context if and only if rotary_scaling is {', '.join(others)} or {last}"
        )
    for name in ("rotary_short_factors", "rotary_long_factors"):
        factors: tuple[float, ...] | None = getattr(config, name)
        if (kind == "longrope") != (factors is not None):
            raise UserError(
                f"model.gpt.rotary_scaling is {kind}, but model.gpt.{name} is {'set' if factors else factors}; "
                f"set {name} if and only if rotary_scaling is longrope"
            )
        if factors is not None and len(factors) * 2 != config.rotary_width:
            raise UserError(
                f"model.gpt.{name} has {len(factors)} numbers, but each head has {config.rotary_width} rotated "
                f"channels; set it to a list of {config.rotary_width // 2} numbers, one per pair of channels"
            )
        if factors is not None and (wrong := [n for n in factors if not 0 < n < math.inf]):
            raise UserError(f"model.gpt.{name} contains {wrong[0]}; all of its numbers must be positive and finite")
    if kind == "longrope" and trained == 1:
        raise UserError(
            "model.gpt.rotary_trained_context is 1, but model.gpt.rotary_scaling is longrope; set it to 2 or more"
        )
    if not has_turns and (turns := config.rotary_slow or config.rotary_fast):
        name = "slow" if config.rotary_slow else "fast"
        raise UserError(
            f"model.gpt.rotary_{name} is {turns}, but model.gpt.rotary_scaling is {kind}; "
            f"remove rotary_{name}, which applies only to {' and '.join(DEFAULT_ROTARY_FAST)}"
        )
    if not config.rotary_truncate and kind != "yarn":
        raise UserError(
            f"model.gpt.rotary_truncate is false, but model.gpt.rotary_scaling is {kind}; "
            f"remove rotary_truncate, which applies only to yarn"
        )
    if has_turns:
        slow, fast = _turn_thresholds(config)
        if slow >= fast:
            raise UserError(
                f"model.gpt.rotary_slow is {slow}, but model.gpt.rotary_fast is {fast}; "
                "rotary_slow must be below rotary_fast"
            )
    if kind in ("ntk", "dynamic") and config.rotary_width < 4:
        raise UserError(
            f"model.gpt.rotary_scaling is {kind}, which requires at least 4 rotated channels per head, but there are "
            f"{config.rotary_width}; choose another model.gpt.head_dim or rotary_share"
        )


def _turn_thresholds(config: "GPTConfig") -> tuple[float, float]:
    """Return ``rotary_slow`` and ``rotary_fast``, with None replaced by the default values.

    They are thresholds for the number of rotations that a channel pair makes over the original context length.
    """
    return (
        config.rotary_slow or DEFAULT_ROTARY_SLOW,
        config.rotary_fast or DEFAULT_ROTARY_FAST[str(config.rotary_scaling)],
    )


class ALiBi(PositionEncoding):
    """Linear penalty on the query-key distance with a different slope per head (https://arxiv.org/abs/2108.12409).

    For n heads, the slope of head h is ``2 ** (-8 / n * (h + 1))`` if n is a power of two. Otherwise, the slopes for
    the largest power of two below n are followed by every other slope for the next power of two, as in the authors'
    code.
    """

    has_score_bias = True
    slopes: Tensor

    @override
    def init_buffers(self) -> None:
        n_head = self.config.n_head
        below = 2 ** math.floor(math.log2(n_head))
        slopes = [2 ** (-8 / below * (h + 1)) for h in range(below)]
        slopes += [2 ** (-4 / below * (h + 1)) for h in range(0, 2 * (n_head - below), 2)]
        self.register_buffer("slopes", torch.tensor(slopes), persistent=False)

    @override
    def score_bias(self, head: Tensor, distance: Tensor) -> Tensor:
        return -self.slopes[head] * distance


POSITION_ENCODINGS: dict[str, type[PositionEncoding]] = {
    "rotary": RotaryPositions,
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
    "alibi": ALiBi,
    "none": PositionEncoding,
}
