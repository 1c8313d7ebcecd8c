"""Llama, and the shape that it shares with its descendants."""

from collections.abc import Iterator
from typing import Any, ClassVar

from typing_extensions import override

from lit_gpt_scratch.interop.hf_config import Fields
from lit_gpt_scratch.interop.hf_rope import read_rope, write_rope
from lit_gpt_scratch.interop.model_family import EMBEDDING, NORM, Family, Piece, Shape, layered
from lit_gpt_scratch.model import GPTConfig

LINEAR = {
    "self_attn.q_proj": "attention.query", "self_attn.k_proj": "attention.key", "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output", "mlp.gate_proj": "feed_forward.gate", "mlp.up_proj": "feed_forward.input",
    "mlp.down_proj": "feed_forward.output",
}  # fmt: skip
"""Theirs to ours."""


class LlamaShape(Family):
    """Rotary positions, RMSNorm before each part, SwiGLU, grouped-query attention.

    Attributes:
        key_value_heads: Where ``config.json`` does not say; None is as many as there are heads.
        head_width: The same of ``head_dim``; None is what the heads' number makes of the width.
        norms: Of each layer, theirs to ours.
    """

    prefix = "model."
    key_value_heads: ClassVar[int | None] = None
    head_width: ClassVar[int | None] = None
    norms: ClassVar[dict[str, tuple[str, ...] | str]] = {
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "feed_forward_norm.weight",
    }
    fixed: ClassVar[dict[str, Any]] = {
        "position": "rotary", "norm": "rmsnorm", "norm_placement": "pre", "feed_forward": "swiglu", "bias": False,
        "qk_norm": False, "sliding_window": None, "rotary_share": 1.0,
    }  # fmt: skip
    free = frozenset({"n_kv_head", "head_dim", "rotary_scaling"})

    @override
    def switches(self, fields: Fields) -> dict[str, Any]:
        heads, width = fields.size("num_attention_heads"), fields.size("hidden_size")
        fields.only("hidden_act", "silu", "swish")
        fields.only("attention_dropout", 0)
        return {
            **self.fixed,
            "n_layer": fields.size("num_hidden_layers"),
            "n_head": heads,
            "n_embd": width,
            "n_kv_head": fields.size("num_key_value_heads", self.key_value_heads or heads, heads),
            "head_dim": fields.size("head_dim", self.head_width or width // heads, width // heads),
            "ffn_dim": fields.size("intermediate_size"),
            "norm_eps": fields.number("rms_norm_eps", 1e-6),
            "initialisation": "normal",
            **read_rope(fields),
        }

    @override
    def write(self, shape: Shape) -> dict[str, Any]:
        gpt = shape.gpt
        return {
            "hidden_size": gpt.n_embd,
            "intermediate_size": gpt.ffn_width,
            "num_hidden_layers": gpt.n_layer,
            "num_attention_heads": gpt.n_head,
            "num_key_value_heads": gpt.kv_heads,
            "head_dim": gpt.head_width,
            "hidden_act": "silu",
            "max_position_embeddings": shape.block_size,
            "rms_norm_eps": gpt.norm_eps,
            "rope_parameters": write_rope(gpt),
            "attention_dropout": 0.0,
        }

    @override
    def pieces(self, gpt: GPTConfig) -> Iterator[Piece]:
        kinds = ("weight", "bias") if gpt.bias else ("weight",)
        linear = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in LINEAR.items() for kind in kinds}
        yield Piece("model.embed_tokens.weight", (EMBEDDING,))
        for layer in range(gpt.n_layer):
            for theirs, ours in layered("model.layers.{}.", layer, {**self.norms, **linear}):
                yield Piece(theirs, ours)
        yield Piece("model.norm.weight", (NORM,))


class Llama(LlamaShape):
    """Llama 1 to 3 (https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783)."""

    model_type, architecture = "llama", "LlamaForCausalLM"
    free = LlamaShape.free | {"bias"}

    @override
    def switches(self, fields: Fields) -> dict[str, Any]:
        attention, feed_forward = fields.flag("attention_bias", False), fields.flag("mlp_bias", False)
        if attention != feed_forward:
            fields.refuse("attention_bias", f"here the same as mlp_bias, which is {feed_forward}")
        fields.only("sliding_window")
        return super().switches(fields) | {"bias": attention}

    @override
    def write(self, shape: Shape) -> dict[str, Any]:
        return super().write(shape) | {"attention_bias": shape.gpt.bias, "mlp_bias": shape.gpt.bias}

    @override
    def obstacles(self, gpt: GPTConfig) -> list[str]:
        found = super().obstacles(gpt)
        if gpt.n_embd % gpt.n_head:  # the library's config of this family refuses it, whatever head_dim says
            found.append(f"n_embd is {gpt.n_embd} (there a multiple of n_head, which is {gpt.n_head})")
        return found
