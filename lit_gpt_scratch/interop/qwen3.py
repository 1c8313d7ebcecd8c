"""Qwen3 (https://arxiv.org/abs/2505.09388): Llama's shape, with queries and keys normalised per head."""

from typing import Any

from typing_extensions import override

from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.interop.llama import LlamaLikeFamily
from lit_gpt_scratch.interop.model_family import ModelShape


class Qwen3Family(LlamaLikeFamily):
    """The dense models."""

    model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    key_value_heads, head_width = 32, 128
    norms = {  # noqa: RUF012 - typed as a class's own in LlamaShape
        **LlamaLikeFamily.norms,
        "self_attn.q_norm.weight": "attention.query_norm.weight",
        "self_attn.k_norm.weight": "attention.key_norm.weight",
    }
    fixed = LlamaLikeFamily.fixed | {"qk_norm": True}

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        fields.allow_only("attention_bias", False)
        return super().parse_config(fields)

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        layers = shape.gpt.n_layer
        return super().build_config(shape) | {
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": layers,
            "layer_types": ["full_attention"] * layers,
        }
