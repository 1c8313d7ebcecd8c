"""Convert the rotary position embedding settings in ``config.json`` to ``GPTConfig`` fields and back.

Both the Transformers v5 format and the older format can be read; only the v5 format is written.
"""

import math
from typing import Any, Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.positions import (
    DEFAULT_ROTARY_FAST,
    DEFAULT_ROTARY_SLOW,
    SCALINGS_FROM_TRAINED_CONTEXT,
)

DEFAULT_THETA: Final = 10_000.0
"""Value of ``rope_theta`` if it is missing, in most families."""
SCALING_FIELDS: Final = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_slow", "beta_fast"),
}
"""Hugging Face names of ``rotary_slow`` and ``rotary_fast``, keyed by scaling type."""
FACTOR_FIELDS: Final = {"short_factor": "rotary_short_factors", "long_factor": "rotary_long_factors"}
"""``GPTConfig`` fields of ``longrope``, keyed by their Hugging Face names."""
READABLE: Final = ("default", "linear", *SCALINGS_FROM_TRAINED_CONTEXT)
KNOWN_FIELDS: Final = {
    "rope_theta", "rope_type", "type", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "attention_factor", "mscale", "mscale_all_dim", "truncate", "finetuned",
    *SCALING_FIELDS["llama3"], *SCALING_FIELDS["yarn"], *FACTOR_FIELDS,
}  # fmt: skip
TOLERANCE: Final = 1e-6
"""Relative tolerance for comparing attention scales, whose precision differs between files."""


def read_rope(fields: HFConfigReader, default_theta: float = DEFAULT_THETA, partial: bool = False) -> dict[str, Any]:
    """Convert rotary position embedding settings to ``GPTConfig`` fields; record unsupported values in ``fields``.

    Args:
        fields: Reader for the whole ``config.json``, in which the settings are in ``rope_parameters`` or, in the older
            format, in ``rope_theta`` and ``rope_scaling``.
        default_theta: Value of ``rope_theta`` if it is missing.
        partial: Whether the family can rotate only a fraction of the channels (``partial_rotary_factor``).

    Raises:
        UserError: A number is missing or invalid.
    """
    rope = fields.nested("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")
    return read_rope_settings(rope, fields, fields.number("rope_theta", default_theta), partial)


def read_rope_settings(
    rope: HFConfigReader, fields: HFConfigReader, default_theta: float, partial: bool = False
) -> dict[str, Any]:
    """Convert the settings in one object of a ``config.json``; see ``read_rope``.

    Args:
        rope: Reader for the object.
        fields: Reader for the whole ``config.json``.
        default_theta: Value of ``rope_theta`` if it is missing from the object.
        partial: Whether the family can rotate only a fraction of the channels.
    """
    settings: dict[str, Any] = {"rotary_base": rope.number("rope_theta", default_theta)}
    name = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.values.get(name, "default")
    kind = "longrope" if kind == "su" else kind  # the name in the first files
    if partial:
        share = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
        settings["rotary_share"] = share
    else:
        rope.allow_only("partial_rotary_factor", 1)
    for unknown in sorted(rope.values.keys() - KNOWN_FIELDS):
        rope.allow_only(unknown)
    if kind == "default":
        return settings
    if kind not in READABLE:
        rope.reject(name, f"must be one of {', '.join(READABLE)}")
        return settings
    if kind == "linear":
        return settings | {"rotary_scaling": kind, "rotary_factor": rope.number("factor")}
    trained = context = fields.positive_int("max_position_embeddings")
    if kind != "dynamic":
        # The top-level field of the older format takes precedence. If both are missing, use the context length.
        outer = fields if fields.values.get("original_max_position_embeddings") else rope
        trained = outer.positive_int("original_max_position_embeddings", context, context)
    factor = rope.number("factor", context / trained if kind == "longrope" else None)
    settings |= {"rotary_scaling": kind, "rotary_factor": factor, "rotary_trained_context": trained}
    if kind == "dynamic":
        return settings
    if kind == "longrope":
        standard = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 and trained > 1 else 1.0
        _validate_attention_scale(rope, ["attention_factor"], rope.number("attention_factor", standard), standard)
        return settings | {ours: rope.positive_numbers(name) for name, ours in FACTOR_FIELDS.items()}
    defaults = (DEFAULT_ROTARY_SLOW, DEFAULT_ROTARY_FAST["yarn"]) if kind == "yarn" else (None, None)
    slow, fast = (rope.number(name, absent) for name, absent in zip(SCALING_FIELDS[kind], defaults, strict=True))
    if slow >= fast:
        rope.reject(SCALING_FIELDS[kind][1], f"must be greater than {SCALING_FIELDS[kind][0]}, which is {slow}")
    if kind == "yarn":
        _validate_yarn_attention_factor(rope, factor)
        settings["rotary_truncate"] = rope.boolean("truncate", True)
    return settings | {"rotary_slow": slow, "rotary_fast": fast}


def _validate_yarn_attention_factor(rope: HFConfigReader, factor: float) -> None:
    """Record YaRN settings as unsupported unless the attention scale is the default."""

    def attention_scale(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    names, scale = ["attention_factor"], attention_scale()
    if rope.values.get("attention_factor") is not None:
        scale = rope.number("attention_factor")
    elif rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        names = ["mscale", "mscale_all_dim"]
        scale = attention_scale(rope.number("mscale")) / attention_scale(rope.number("mscale_all_dim"))
    _validate_attention_scale(rope, names, scale, attention_scale())


def _validate_attention_scale(rope: HFConfigReader, names: list[str], scale: float, standard: float) -> None:
    """Record the fields that set the attention scale as unsupported unless the scale is the standard one."""
    if not math.isclose(scale, standard, rel_tol=TOLERANCE):
        for name in names:
            rope.reject(name, f"the attention scale must be {standard:.6g}, which follows from the other settings")


def read_context(gpt: GPTConfig, positions: int) -> int:
    """Return the context length of a model whose ``config.json`` has the given ``max_position_embeddings``.

    With ``dynamic``, this field is the original context length, which the factor extends.
    """
    return int(positions * gpt.rotary_factor) if gpt.rotary_scaling == "dynamic" else positions


def write_context(gpt: GPTConfig, block_size: int) -> int:
    """Return ``max_position_embeddings`` for a model with the given context length; see ``read_context``.

    Raises:
        UserError: The context length does not follow from the original context length and the factor of ``dynamic``.
    """
    if gpt.rotary_scaling != "dynamic":
        return block_size
    trained = gpt.rotary_trained_context or 0
    if (extended := read_context(gpt, trained)) != block_size:
        raise UserError(
            f"model.gpt.rotary_scaling is dynamic, which a Hugging Face config can describe only for a context of "
            f"{extended} tokens (rotary_trained_context * rotary_factor), but the context is {block_size}; change "
            f"one of them, or use ntk or yarn"
        )
    return trained


def write_rope(gpt: GPTConfig) -> dict[str, Any]:
    """Return the Transformers v5 ``rope_parameters`` for a config that uses rotary position embeddings."""
    kind, base, factor = gpt.rotary_scaling, gpt.rotary_base, gpt.rotary_factor
    if kind == "ntk":  # NTK scaling is equivalent to a larger base, which other programs can read
        width = gpt.rotary_width
        kind, base = None, base * factor ** (width / (width - 2))
    rope: dict[str, Any] = {"rope_theta": base, "rope_type": kind or "default"}
    if gpt.rotary_share != 1:
        rope["partial_rotary_factor"] = gpt.rotary_share
    if kind is not None:
        rope["factor"] = factor
    if kind in (*SCALING_FIELDS, "longrope"):
        rope["original_max_position_embeddings"] = gpt.rotary_trained_context
    if kind == "longrope":
        rope |= {name: list(getattr(gpt, ours)) for name, ours in FACTOR_FIELDS.items()}
    if kind in SCALING_FIELDS:
        slow, fast = SCALING_FIELDS[kind]
        rope |= {slow: gpt.rotary_slow or DEFAULT_ROTARY_SLOW, fast: gpt.rotary_fast or DEFAULT_ROTARY_FAST[kind]}
    if kind == "yarn":
        rope["truncate"] = gpt.rotary_truncate
    return rope
