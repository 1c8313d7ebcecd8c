"""Convert Gemma 2 and Gemma 3 models, whose blocks attend either to a sliding window or to all preceding tokens."""

import math
from typing import Any, ClassVar, Final

from typing_extensions import override

from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.interop.hf_layer_types import GLOBAL, LOCAL, read_layer_types, write_layer_types
from lit_gpt_scratch.interop.hf_rope import read_rope_settings, write_rope
from lit_gpt_scratch.interop.llama_family import NO_PADDING, LlamaLikeFamily
from lit_gpt_scratch.interop.model_family import ModelShape
from lit_gpt_scratch.model import GPTConfig

DEFAULT_WINDOW: Final = 4096
DEFAULT_ATTENTION_SCALAR: Final = 256
"""Values of ``sliding_window`` and ``query_pre_attn_scalar`` if they are missing."""


class GemmaFamily(LlamaLikeFamily):
    """Base class for Gemma models, with zero-centered RMSNorms, GeGLU and scaled embeddings.

    Attributes:
        default_pattern: Value of ``sliding_window_pattern`` if ``config.json`` contains neither it nor ``layer_types``.
        default_logit_softcap: Value of ``final_logit_softcapping`` if ``config.json`` does not specify it.
    """

    default_pattern: ClassVar[int]
    default_logit_softcap: ClassVar[float | None] = None
    tied_by_default = True
    default_kv_heads = 4
    default_head_dim = 256
    heads_divide_width = True
    activation_field = "hidden_activation"
    activations = ("gelu_pytorch_tanh", "gelu_new")
    norm_names: ClassVar[dict[str, tuple[str, ...] | str]] = {
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "attention_end.weight",
        "pre_feedforward_layernorm.weight": "feed_forward_norm.weight",
        "post_feedforward_layernorm.weight": "feed_forward_end.weight",
    }
    fixed = LlamaLikeFamily.fixed | {
        "norm": "zero_centered_rmsnorm", "norm_placement": "sandwich", "feed_forward": "geglu",
        "scaled_embeddings": True,
    }  # fmt: skip
    configurable = LlamaLikeFamily.configurable | {
        "sliding_window", "sliding_window_pattern", "attention_scale", "logit_softcap",
    }  # fmt: skip

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        fields.allow_only("attention_bias", False)
        fields.allow_only("use_bidirectional_attention", False)
        config = super().parse_config(fields)
        scalar = fields.positive_int("query_pre_attn_scalar", DEFAULT_ATTENTION_SCALAR)
        return config | read_layer_types(fields, self.default_pattern, DEFAULT_WINDOW) | {
            "attention_scale": None if scalar == config["head_dim"] else scalar**-0.5,
            "logit_softcap": _read_softcap(fields, "final_logit_softcapping", self.default_logit_softcap),
        }  # fmt: skip

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        gpt = shape.gpt
        return super().build_config(shape) | {
            **NO_PADDING,
            "attention_bias": False,
            "query_pre_attn_scalar": _attention_scalar(gpt),
            "attn_logit_softcapping": gpt.attention_softcap,
            "final_logit_softcapping": gpt.logit_softcap,
            **write_layer_types(gpt, shape.block_size),
        }

    @override
    def unsupported_settings(self, gpt: GPTConfig) -> list[str]:
        found = super().unsupported_settings(gpt)
        scale = gpt.attention_scale
        if scale is not None and not math.isclose(_attention_scalar(gpt) ** -0.5, scale, rel_tol=1e-12):
            found.append(f"attention_scale is {scale} (must be the inverse square root of an integer)")
        return found


class Gemma2Family(GemmaFamily):
    """Gemma 2 models (https://arxiv.org/abs/2408.00118), with soft caps; every second block is global."""

    model_type, architecture = "gemma2", "Gemma2ForCausalLM"
    default_pattern = 2
    default_logit_softcap = 30.0
    configurable = GemmaFamily.configurable | {"attention_softcap"}
    reads = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        return super().parse_config(fields) | {
            "attention_softcap": _read_softcap(fields, "attn_logit_softcapping", 50.0)
        }


class Gemma3Family(GemmaFamily):
    """Text-only Gemma 3 models (https://arxiv.org/abs/2503.19786), with QK-norm; every sixth block is global.

    Local blocks have their own rotary base, and only the frequencies of global blocks are scaled.
    """

    model_type, architecture = "gemma3_text", "Gemma3ForCausalLM"
    default_pattern = 6
    norm_names: ClassVar[dict[str, tuple[str, ...] | str]] = {
        **GemmaFamily.norm_names,
        "self_attn.q_norm.weight": "attention.query_norm.weight",
        "self_attn.k_norm.weight": "attention.key_norm.weight",
    }
    fixed = GemmaFamily.fixed | {"qk_norm": True}
    configurable = GemmaFamily.configurable | {"rotary_local_base"}
    reads = frozenset({"final_logit_softcapping"})

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        config = super().parse_config(fields)
        if config.get("sliding_window_pattern") is not None:
            return config
        # All blocks are of one kind, so only one of the two bases applies.
        local_base = config.pop("rotary_local_base", None)
        if config.get("sliding_window") is None or local_base is None:
            return config
        return {n: value for n, value in config.items() if not n.startswith("rotary_")} | {"rotary_base": local_base}

    @override
    def parse_rope(self, fields: HFConfigReader) -> dict[str, Any]:
        ropes, scaling = fields.nested("rope_parameters"), fields.nested("rope_scaling")
        for name in sorted(ropes.values.keys() - {LOCAL, GLOBAL}):
            ropes.allow_only(name)
        own = scaling if scaling.values else ropes.nested(GLOBAL)
        in_global = read_rope_settings(own, fields, fields.number("rope_theta", 1_000_000.0))
        in_local = read_rope_settings(ropes.nested(LOCAL), fields, fields.number("rope_local_base_freq", 10_000.0))
        if in_local == in_global:
            return in_global
        if in_local.keys() != {"rotary_base"}:
            ropes.reject(LOCAL, f"rope_type must be default, unless {GLOBAL} has the same values")
        return in_global | {"rotary_local_base": in_local["rotary_base"]}

    @override
    def build_rope(self, gpt: GPTConfig) -> dict[str, Any]:
        in_global = write_rope(gpt)
        in_local = {"rope_theta": gpt.rotary_local_base, "rope_type": "default"}
        return {GLOBAL: in_global, LOCAL: in_global if gpt.rotary_local_base is None else in_local}


def _read_softcap(fields: HFConfigReader, name: str, default: float | None) -> float | None:
    """Return the soft cap in a field, which is ``default`` if the field is missing, and None if it is null."""
    return None if fields.values.get(name, default) is None else fields.number(name, default)


def _attention_scalar(gpt: GPTConfig) -> int:
    """Return ``query_pre_attn_scalar``, the nearest integer to the inverse square of the attention scale."""
    return gpt.head_width if gpt.attention_scale is None else max(1, round(gpt.attention_scale**-2))
