"""Rotary positions as ``config.json`` writes them, in its old layout and in that of transformers 5."""

import math
from typing import Any, Final

from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.positions import DEFAULT_ROTARY_FAST, DEFAULT_ROTARY_SLOW

DEFAULT_THETA: Final = 10_000.0
"""Where the file names none."""
SCALING_FIELDS: Final = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_slow", "beta_fast"),
}
"""What ``rotary_slow`` and ``rotary_fast`` are called, by the kind of scaling."""
KNOWN_FIELDS: Final = {
    "rope_theta", "rope_type", "type", "factor", "partial_rotary_factor", "original_max_position_embeddings",
    "attention_factor", "mscale", "mscale_all_dim", "truncate", "finetuned",
    *SCALING_FIELDS["llama3"], *SCALING_FIELDS["yarn"],
}  # fmt: skip
TOLERANCE: Final = 1e-6
"""Files write numbers with more or fewer digits; closer than this is the same to float32."""


def read_rope(fields: HFConfigReader) -> dict[str, Any]:
    """The rotary switches that a config describes; what there is no switch for is gathered in ``fields``.

    Args:
        fields: Of the whole file: ``rope_parameters``, or ``rope_theta`` and ``rope_scaling``.

    Raises:
        UserError: A number is none, or is missing.
    """
    rope = fields.nested("rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters")
    switches: dict[str, Any] = {"rotary_base": rope.number("rope_theta", fields.number("rope_theta", DEFAULT_THETA))}
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    rope.allow_only("partial_rotary_factor", 1)
    for name in sorted(rope.values.keys() - KNOWN_FIELDS):
        rope.allow_only(name)
    if kind == "default":
        return switches
    if kind not in ("linear", *SCALING_FIELDS):
        rope.reject(
            "rope_type" if "rope_type" in rope.values else "type", f"only default, linear, {', '.join(SCALING_FIELDS)}"
        )
        return switches
    switches |= {"rotary_scaling": kind, "rotary_factor": (factor := rope.number("factor"))}
    if kind == "linear":
        return switches
    # Outside it is the older way, and goes first; without either, the context that the file names was trained in.
    outer = fields if fields.values.get("original_max_position_embeddings") else rope
    switches["rotary_trained_context"] = outer.positive_int(
        "original_max_position_embeddings", *[fields.positive_int("max_position_embeddings")] * 2
    )
    defaults = (DEFAULT_ROTARY_SLOW, DEFAULT_ROTARY_FAST["yarn"]) if kind == "yarn" else (None, None)
    slow, fast = (rope.number(name, absent) for name, absent in zip(SCALING_FIELDS[kind], defaults, strict=True))
    if slow >= fast:
        rope.reject(SCALING_FIELDS[kind][1], f"more than {SCALING_FIELDS[kind][0]}, which is {slow}")
    if kind == "yarn":
        _validate_yarn_attention_factor(rope, factor)
    return switches | {"rotary_slow": slow, "rotary_fast": fast}


def _validate_yarn_attention_factor(rope: HFConfigReader, factor: float) -> None:
    """What sharpens attention follows from the factor here, and the range of the slowed pairs is whole numbers."""

    def sharper(share: float = 1.0) -> float:
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0

    names, asked = ["attention_factor"], sharper()
    if rope.values.get("attention_factor") is not None:
        asked = rope.number("attention_factor")
    elif rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        names = ["mscale", "mscale_all_dim"]
        asked = sharper(rope.number("mscale")) / sharper(rope.number("mscale_all_dim"))
    if not math.isclose(asked, sharper(), rel_tol=TOLERANCE):
        for name in names:
            rope.reject(name, f"with factor {factor} only what sharpens attention by {sharper():.6g}")
    rope.allow_only("truncate", True)


def write_rope(gpt: GPTConfig) -> dict[str, Any]:
    """``rope_parameters`` of a config with rotary positions, in the layout of transformers 5."""
    kind, base, factor = gpt.rotary_scaling, gpt.rotary_base, gpt.rotary_factor
    if kind == "ntk":  # no more than another base, and that is how others can read it
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
