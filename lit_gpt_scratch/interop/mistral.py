"""Mistral (https://arxiv.org/abs/2310.06825): Llama's shape, with a sliding window."""

from typing import Any

from typing_extensions import override

from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.interop.llama import LlamaLikeFamily
from lit_gpt_scratch.interop.model_family import ModelShape


class MistralFamily(LlamaLikeFamily):
    """The dense models; later ones have no window."""

    model_type, architecture = "mistral", "MistralForCausalLM"
    key_value_heads = 8
    free = LlamaLikeFamily.free | {"sliding_window"}

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        fields.allow_only("attention_bias", False)
        fields.allow_only("mlp_bias", False)
        unlimited = fields.values.get("sliding_window", 0) is None
        return super().parse_config(fields) | {
            "sliding_window": None if unlimited else fields.positive_int("sliding_window", absent=4096)
        }

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        return super().build_config(shape) | {"sliding_window": shape.gpt.sliding_window}
