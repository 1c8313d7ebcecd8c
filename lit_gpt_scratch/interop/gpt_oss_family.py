"""Convert gpt-oss models, whose experts are stored as stacked and interleaved matrices, published ones in MXFP4."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

from typing_extensions import override

from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.interop.hf_layer_types import read_layer_types, write_layer_types
from lit_gpt_scratch.interop.llama_family import ATTENTION_NAMES, NO_PADDING, LlamaLikeFamily
from lit_gpt_scratch.interop.model_family import ModelShape, TensorMapping
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.feed_forward import SWIGLU_LIMIT, SWIGLU_SLOPE

DEFAULT_ROPE: Final = {
    "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False,
}  # fmt: skip
"""Value of ``rope_parameters`` if ``config.json`` does not specify it."""
EXPERT_NAMES: Final = {"gate_up_proj": ("gate", "input"), "down_proj": ("output",)}
"""Map from the Hugging Face names of the experts' matrices to the names in this package."""


class GptOssFamily(LlamaLikeFamily):
    """gpt-oss models (https://arxiv.org/abs/2508.10925): learned attention sinks, biases and a mixture of experts.

    Every second block is global.
    """

    model_type, architecture = "gpt_oss", "GptOssForCausalLM"
    default_kv_heads = 8
    default_head_dim = 64
    default_norm_eps = 1e-5
    default_theta = 150_000.0
    reads = frozenset({"num_local_experts", "quantization_config"})
    linear_names: ClassVar[Mapping[str, tuple[str, ...] | str]] = ATTENTION_NAMES | {
        "mlp.router": "feed_forward.router"
    }
    fixed = LlamaLikeFamily.fixed | {
        "bias": True, "attention_sinks": True, "feed_forward": "moe", "expert_activation": "clamped_swiglu",
    }  # fmt: skip
    configurable = LlamaLikeFamily.configurable | {"sliding_window", "sliding_window_pattern"}

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        fields.allow_only("attention_bias", True)
        fields.allow_only("swiglu_limit", SWIGLU_LIMIT)
        fields.allow_only("swiglu_alpha", SWIGLU_SLOPE)
        fields.nested("quantization_config").allow_only("quant_method", "mxfp4")
        return super().parse_config(fields) | read_layer_types(fields, default_pattern=2, default_window=128) | {
            "n_experts": fields.positive_int("num_local_experts", 128),
            "experts_per_token": fields.positive_int("num_experts_per_tok", 4),
        }  # fmt: skip

    @override
    def parse_rope(self, fields: HFConfigReader) -> dict[str, Any]:
        if not fields.values.get("rope_scaling") and fields.values.get("rope_parameters") is None:
            fields.values["rope_parameters"] = DEFAULT_ROPE
        return super().parse_rope(fields)

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        return super().build_config(shape) | {
            **NO_PADDING,
            **write_layer_types(shape.gpt, shape.block_size),
            "attention_bias": True,
            "num_local_experts": shape.gpt.n_experts,
            "num_experts_per_tok": shape.gpt.experts_per_token,
            "swiglu_alpha": SWIGLU_SLOPE,
            "swiglu_limit": SWIGLU_LIMIT,
        }

    @override
    def tensor_mappings(self, gpt: GPTConfig) -> Iterator[TensorMapping]:
        yield from super().tensor_mappings(gpt)
        for layer in range(gpt.n_layer):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            yield TensorMapping(f"{theirs}.self_attn.sinks", (f"{ours}.attention.sinks.logits",))
            for hf_name, names in EXPERT_NAMES.items():
                for suffix, kind in (("", "weight"), ("_bias", "bias")):
                    yield TensorMapping(
                        f"{theirs}.mlp.experts.{hf_name}{suffix}",
                        tuple(f"{ours}.feed_forward.experts.{name}.{kind}" for name in names),
                        transposed=kind == "weight",
                        interleaved=True,
                    )
