"""Mistral (https://arxiv.org/abs/2310.06825): Llama's shape, with a sliding window."""

from typing import Any

from typing_extensions import override

from lit_gpt_scratch.interop.hf_config import Fields
from lit_gpt_scratch.interop.llama import LlamaShape
from lit_gpt_scratch.interop.model_family import Shape


class Mistral(LlamaShape):
    """The dense models; later ones have no window."""

    model_type, architecture = "mistral", "MistralForCausalLM"
    key_value_heads = 8
    free = LlamaShape.free | {"sliding_window"}

    @override
    def switches(self, fields: Fields) -> dict[str, Any]:
        fields.only("attention_bias", False)
        fields.only("mlp_bias", False)
        unlimited = fields.values.get("sliding_window", 0) is None
        return super().switches(fields) | {
            "sliding_window": None if unlimited else fields.size("sliding_window", absent=4096)
        }

    @override
    def write(self, shape: Shape) -> dict[str, Any]:
        return super().write(shape) | {"sliding_window": shape.gpt.sliding_window}
