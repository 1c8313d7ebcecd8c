"""Qwen3 (https://arxiv.org/abs/2505.09388): Llama's shape, with queries and keys normalised per head."""

from typing import Any

from typing_extensions import override

from lit_gpt_scratch.interop.hf_config import Fields
from lit_gpt_scratch.interop.llama import LlamaShape
from lit_gpt_scratch.interop.model_family import Shape


class Qwen3(LlamaShape):
    """The dense models."""

    model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    key_value_heads, head_width = 32, 128
    norms = {  # noqa: RUF012 - typed as a class's own in LlamaShape
        **LlamaShape.norms,
        "self_attn.q_norm.weight": "attention.query_norm.weight",
        "self_attn.k_norm.weight": "attention.key_norm.weight",
    }
    fixed = LlamaShape.fixed | {"qk_norm": True}

    @override
    def switches(self, fields: Fields) -> dict[str, Any]:
        fields.only("attention_bias", False)
        return super().switches(fields)

    @override
    def write(self, shape: Shape) -> dict[str, Any]:
        layers = shape.gpt.n_layer
        return super().write(shape) | {
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": layers,
            "layer_types": ["full_attention"] * layers,
        }
