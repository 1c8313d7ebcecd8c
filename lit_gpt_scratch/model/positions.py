"""How the transformer knows order. A scheme of one's own is a class here, and its name in the table at the end."""

import math
import operator
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_gpt_scratch.errors import UserError

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig


class PositionEncoding(nn.Module):
    """No positions at all, and the interface of the others (causal attention alone still leaks some order).

    A scheme may add to the embeddings, turn queries and keys, or add to attention's scores. ``positions`` are int64:
    (T,) where all windows of a batch count alike, else (B, T).
    """

    has_score_bias: bool = False
    """Whether ``bias`` adds anything."""

    def __init__(self, config: "GPTConfig", block_size: int) -> None:
        super().__init__()

    @staticmethod
    def validate(config: "GPTConfig") -> None:
        """Refuse a config that the scheme cannot work with.

        Raises:
            UserError: Two switches contradict each other.
        """
        alone = {"share": 1.0, "scaling": None, "factor": 1.0, "trained_context": None, "slow": None, "fast": None}
        for name, absent in alone.items():
            if (value := getattr(config, f"rotary_{name}")) != absent:
                raise UserError(
                    f"model.gpt.rotary_{name} is {value}, but model.gpt.position is {config.position}; it needs rotary"
                )

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add positions to token embeddings. x: (B, T, n_embd) -> (B, T, n_embd)."""
        return x

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """What ``rotate`` needs to know of the positions, worked out once for all blocks."""
        return None

    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """Turn queries or keys by their position. x: (B, H, T, head_dim) -> (B, H, T, head_dim)."""
        return x

    def score_bias(self, head: Tensor, distance: Tensor) -> Tensor:
        """What is added to a score, by the number of the head and how far back the key stands, int64; elementwise."""
        raise NotImplementedError


class LearnedPositions(PositionEncoding):
    """One learned vector a position, added to the embedding (GPT-2)."""

    def __init__(self, config: "GPTConfig", block_size: int) -> None:
        super().__init__(config, block_size)
        self.table = nn.Embedding(block_size, config.n_embd)

    @override
    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = x + self.table(positions)
        return out


class SinusoidalPositions(PositionEncoding):
    """Fixed sines and cosines, added to the embedding (https://arxiv.org/abs/1706.03762, section 3.5).

    Channel 2i is the sine and channel 2i + 1 the cosine of ``position / 10000 ** (2i / n_embd)``.
    """

    table: Tensor

    def __init__(self, config: "GPTConfig", block_size: int) -> None:
        super().__init__(config, block_size)
        even = torch.arange(0, config.n_embd, 2, dtype=torch.float32)  # (n_embd / 2,)
        place = torch.arange(block_size, dtype=torch.float32)
        angle = torch.outer(place, 10_000.0 ** (-even / config.n_embd))  # (T, n_embd / 2)
        table = torch.stack((angle.sin(), angle.cos()), dim=-1).view(block_size, config.n_embd)
        self.register_buffer("table", table, persistent=False)

    @staticmethod
    @override
    def validate(config: "GPTConfig") -> None:
        PositionEncoding.validate(config)
        if config.n_embd % 2:
            raise UserError(
                f"model.gpt.position sinusoidal needs pairs of channels, but model.gpt.n_embd is {config.n_embd}"
            )

    @override
    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table[positions].type_as(x)


class RotaryPositions(PositionEncoding):
    """Rotary positions (https://arxiv.org/abs/2104.09864), in the half-split layout of Llama and Qwen.

    Channel ``i`` of the first half and of the second half form a pair; at position ``t`` the pair is turned
    by the angle ``t * base ** (-2i / head_dim)``. A dot product of a turned query and a turned key depends
    only on how far apart they stand. With ``rotary_share`` below 1 only the first channels are turned (GPT-NeoX).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: "GPTConfig", block_size: int) -> None:
        super().__init__(config, block_size)
        self.width = config.rotary_width
        frequency, factor = rotary_frequencies(config, self.width)
        angle = torch.outer(torch.arange(block_size, dtype=torch.float32), frequency)  # (T, width / 2)
        cos, sin = factor * angle.cos(), factor * angle.sin()
        # Tables, not parameters: made anew on every construction, never stored in a checkpoint.
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1), persistent=False)  # (T, width)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1), persistent=False)  # (T, width)

    @staticmethod
    @override
    def validate(config: "GPTConfig") -> None:
        if config.rotary_width % 2 or not 0 < config.rotary_width <= config.head_width:
            raise UserError(
                f"model.gpt.position rotary turns pairs of channels, but of a head's {config.head_width} it would be "
                f"{config.rotary_width}; choose another model.gpt.head_dim, rotary_share or position"
            )
        validate_rotary_scaling(config)

    @override
    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[positions].unsqueeze(-3), self.sin[positions].unsqueeze(-3)  # (1, T, width) or (B, 1, T, width)

    @override
    def rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        assert rotation is not None
        cos, sin = rotation
        # In the tables' float32 where the heads have fewer bits; gradients, too, are then added up in it.
        turned = x[..., : self.width].to(torch.promote_types(x.dtype, cos.dtype))  # (B, H, T, width)
        turned = turned * cos + turned.roll(self.width // 2, dims=-1) * sin
        turned = turned.type_as(x)
        return turned if self.width == x.size(-1) else torch.cat((turned, x[..., self.width :]), dim=-1)


class ALiBi(PositionEncoding):
    """Scores fall linearly with the distance, steeper in some heads than in others (https://arxiv.org/abs/2108.12409).

    The slopes are ``2 ** (-8 / n * (h + 1))`` for n heads where n is a power of two; else those of the power below,
    and then every other one of the power above, as the authors' code has it.
    """

    has_score_bias = True
    slopes: Tensor

    def __init__(self, config: "GPTConfig", block_size: int) -> None:
        super().__init__(config, block_size)
        below = 2 ** math.floor(math.log2(config.n_head))
        slopes = [2 ** (-8 / below * (h + 1)) for h in range(below)]
        slopes += [2 ** (-4 / below * (h + 1)) for h in range(0, 2 * (config.n_head - below), 2)]
        self.register_buffer("slopes", torch.tensor(slopes), persistent=False)

    @override
    def score_bias(self, head: Tensor, distance: Tensor) -> Tensor:
        return -self.slopes[head] * distance


POSITION_ENCODINGS: dict[str, type[PositionEncoding]] = {
    "rotary": RotaryPositions, "learned": LearnedPositions, "sinusoidal": SinusoidalPositions,
    "alibi": ALiBi, "none": PositionEncoding,
}  # fmt: skip


if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig

ROTARY_SCALINGS: Final = ("linear", "ntk", "llama3", "yarn")
DEFAULT_ROTARY_SLOW: Final = 1.0
DEFAULT_ROTARY_FAST: Final = {"llama3": 4.0, "yarn": 32.0}
"""Turns within the trained context above which a pair of channels is left alone, where the config names none."""


def validate_rotary_scaling(config: "GPTConfig") -> None:
    """Refuse settings that contradict each other.

    Raises:
        UserError: Both are named.
    """
    kind, trained = config.rotary_scaling, config.rotary_trained_context
    if config.rotary_base <= 1:
        raise UserError(f"model.gpt.rotary_base is {config.rotary_base}; it must be above 1")
    if kind is None and config.rotary_factor != 1:
        raise UserError(
            f"model.gpt.rotary_factor is {config.rotary_factor}, but model.gpt.rotary_scaling is not set; "
            f"choose one of {', '.join(ROTARY_SCALINGS)}"
        )
    if (kind in DEFAULT_ROTARY_FAST) != (trained is not None):
        raise UserError(
            f"model.gpt.rotary_scaling is {kind}, but model.gpt.rotary_trained_context is {trained}; "
            f"{' and '.join(DEFAULT_ROTARY_FAST)} need it, and nothing else does"
        )
    if kind not in DEFAULT_ROTARY_FAST and (turns := config.rotary_slow or config.rotary_fast):
        name = "slow" if config.rotary_slow else "fast"
        raise UserError(
            f"model.gpt.rotary_{name} is {turns}, but model.gpt.rotary_scaling is {kind}; "
            f"it needs {' or '.join(DEFAULT_ROTARY_FAST)}"
        )
    if kind in DEFAULT_ROTARY_FAST and not operator.lt(*_turns(config)):
        slow, fast = _turns(config)
        raise UserError(f"model.gpt.rotary_slow is {slow}, but model.gpt.rotary_fast is {fast}; it must be below it")
    if kind == "ntk" and config.rotary_width < 4:
        raise UserError(
            f"model.gpt.rotary_scaling is ntk, but of a head {config.rotary_width} channels are turned; 4 do"
        )


def _turns(config: "GPTConfig") -> tuple[float, float]:
    """Below how many turns within the trained context a pair is slowed in full, and above how many not at all."""
    return config.rotary_slow or DEFAULT_ROTARY_SLOW, config.rotary_fast or DEFAULT_ROTARY_FAST[
        str(config.rotary_scaling)
    ]


def rotary_frequencies(config: "GPTConfig", width: int) -> tuple[Tensor, float]:
    """The angle by which each pair of channels turns from one token to the next.

    - ``linear``: all slower by the factor (https://arxiv.org/abs/2306.15595).
    - ``ntk``: another base, so that the slowest pair is slower by the factor and the fastest as it was
      (NTK-aware, https://arxiv.org/abs/2309.00071, section 3.1).
    - ``llama3``: pairs that turn less than ``rotary_slow`` times within the trained context are slowed by the factor,
      those above ``rotary_fast`` are left alone, and in between the share grows with the turns (Llama 3.1).
    - ``yarn``: the same, but the share grows with the pair's number, and attention is sharpened
      (https://arxiv.org/abs/2309.00071, section 3.2 and 3.4).

    Args:
        config: The architecture.
        width: Channels of a head that are turned.

    Returns:
        (width / 2,) float32, and what cosines and sines are multiplied by.
    """
    half = torch.arange(0, width, 2, dtype=torch.float32)  # (width / 2,)
    plain = 1.0 / config.rotary_base ** (half / width)  # written as it was published: another way rounds otherwise
    kind, factor = config.rotary_scaling, config.rotary_factor
    if kind is None:
        return plain, 1.0
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "ntk":
        return 1.0 / (config.rotary_base * factor ** (width / (width - 2))) ** (half / width), 1.0
    assert config.rotary_trained_context is not None
    slow, fast = _turns(config)
    if kind == "llama3":
        turns = config.rotary_trained_context * plain / (2 * math.pi)
        kept = ((turns - slow) / (fast - slow)).clamp(0, 1)  # (width / 2,), share of the frequency as it was
        return plain * kept + plain / factor * (1 - kept), 1.0

    def pair(turns: float) -> float:
        """The number of the pair that turns so many times within the trained context."""
        wavelength = (config.rotary_trained_context or 0) / turns / (2 * math.pi)
        return width * math.log(wavelength) / (2 * math.log(config.rotary_base))

    first, last = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), width - 1)
    slowed = ((half / 2 - first) / max(last - first, 0.001)).clamp(0, 1)  # (width / 2,)
    sharper = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return plain * (1 - slowed) + plain / factor * slowed, sharper
