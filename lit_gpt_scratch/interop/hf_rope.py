"""Convert the rotary position embedding settings in ``config.json`` to ``GPTConfig`` fields and back.

Both the Transformers v5 format and the older format can be read; only the v5 format is written.
"""

import math
from typing import Any, Final

from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.positions import DEFAULT_ROTARY_FAST, DEFAULT_ROTARY_SLOW

DEFAULT_THETA: Final = 10_000.0
"""Value of ``rope_theta`` if it is missing, in most families."""
SCALING_FIELDS: Final = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_slow", "beta_fast"),
}
"""Hugging Face names of ``rotary_slow`` and ``rotary_fast``, keyed by scaling type."""
KNOWN_FIELDS: Final = {
    "rope_theta", "rope_type", "type", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "attention_factor", "mscale", "mscale_all_dim", "truncate", "finetuned",
    *SCALING_FIELDS["llama3"], *SCALING_FIELDS["yarn"],
}  # fmt: skip
TOLERANCE: Final = 1e-6
"""Relative tolerance for comparing attention scales, whose precision differs between files."""


def read_rope(fields: HFConfigReader, default_theta: float = DEFAULT_THETA) -> dict[str, Any]:
    """Convert rotary position embedding settings to ``GPTConfig`` fields; record unsupported values in ``fields``.

    Args:
        fields: Reader for the whole ``config.json``, in which the settings are in ``rope_parameters`` or, in the older
            format, in ``rope_theta`` and ``rope_scaling``.
        default_theta: Value of ``rope_theta`` if it is missing.

    Raises:
        UserError: A number is missing or invalid.
    """
    rope = fields.nested("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")
    settings: dict[str, Any] = {"rotary_base": rope.number("rope_theta", fields.number("rope_theta", default_theta))}
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    rope.allow_only("partial_rotary_factor", 1)
    for name in sorted(rope.values.keys() - KNOWN_FIELDS):
        rope.allow_only(name)
    if kind == "default":
        return settings
    if kind not in ("linear", *SCALING_FIELDS):
        rope.reject(
            "rope_type" if "rope_type" in rope.values else "type",
            f"must be one of default, linear, {', '.join(SCALING_FIELDS)}",
        )
        return settings
    settings |= {"rotary_scaling": kind, "rotary_factor": (factor := rope.number("factor"))}
    if kind == "linear":
        return settings
    # The top-level field of the older format takes precedence. If both are missing, use the context length.
    outer = fields if fields.values.get("original_max_position_embeddings") else rope
    settings["rotary_trained_context"] = outer.positive_int(
        "original_max_position_embeddings", *[fields.positive_int("max_position_embeddings")] * 2
    )
    defaults = (DEFAULT_ROTARY_SLOW, DEFAULT_ROTARY_FAST["yarn"]) if kind == "yarn" else (None, None)
    slow, fast = (rope.number(name, absent) for name, absent in zip(SCALING_FIELDS[kind], defaults, strict=True))
    if slow >= fast:
        rope.reject(SCALING_FIELDS[kind][1], f"must be greater than {SCALING_FIELDS[kind][0]}, which is {slow}")
    if kind == "yarn":
        _validate_yarn_attention_factor(rope, factor)
    return settings | {"rotary_slow": slow, "rotary_fast": fast}


def _validate_yarn_attention_factor(rope: HFConfigReader, factor: float) -> None:
    """Record YaRN settings as unsupported unless the attention scale is the default and ``truncate`` is true."""

    def attention_scale(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    names, scale = ["attention_factor"], attention_scale()
    if rope.values.get("attention_factor") is not None:
        scale = rope.number("attention_factor")
    elif rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        names = ["mscale", "mscale_all_dim"]
        scale = attention_scale(rope.number("mscale")) / attention_scale(rope.number("mscale_all_dim"))
    if not math.isclose(scale, attention_scale(), rel_tol=TOLERANCE):
        for name in names:
            rope.reject(name, f"with factor {factor}, the attention scale must be {attention_scale():.6g}")
    rope.allow_only("truncate", True)


def write_rope(gpt: GPTConfig) -> dict[str, Any]:
    """Return the Transformers v5 ``rope_parameters`` for a config that uses rotary position embeddings."""
    kind, base, factor = gpt.rotary_scaling, gpt.rotary_base, gpt.rotary_factor
    if kind == "ntk":  # NTK scaling is equivalent to a larger base, which other programs can read
        width = gpt.rotary_width
        kind, base = None, base * factor ** (width / (width - 2))
    rope: dict[str, Any] = {"rope_theta": base, "rope_type": kind or "default"}
    if kind is not None:
        rope["factor"] = factor
    if kind in SCALING_FIELDS:
        slow, fast = SCALING_FIELDS[kind]
        rope["original_max_position_embeddings"] = gpt.rotary_trained_context
        rope |= {slow: gpt.rotary_slow or DEFAULT_ROTARY_SLOW, fast: gpt.rotary_fast or DEFAULT_ROTARY_FAST[kind]}
    return rope
