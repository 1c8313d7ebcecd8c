"""Convert GPT-2 models (Radford et al. 2019).

Hugging Face stores the weights of their linear layers transposed (``Conv1D``), and combines the query, key and value
projections of a block in one layer.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Final

from typing_extensions import override

from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.interop.model_family import (
    EMBEDDING,
    NORM,
    ModelFamily,
    ModelShape,
    TensorMapping,
    map_layer_names,
)
from lit_gpt_scratch.model import GPTConfig

DROPOUT_FIELDS: Final = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
MODULE_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "ln_1": ("attention_norm",),
    "attn.c_attn": ("attention.query", "attention.key", "attention.value"),
    "attn.c_proj": ("attention.output",),
    "ln_2": ("feed_forward_norm",),
    "mlp.c_fc": ("feed_forward.input",),
    "mlp.c_proj": ("feed_forward.output",),
}
"""Map from the Hugging Face names of a block's modules to the names in this package.

Each module has a weight and a bias.
"""


class GPT2Family(ModelFamily):
    """GPT-2 models with learned position embeddings, pre-LayerNorm, GELU, and biases in all layers."""

    model_type, architecture, prefix, context_field = "gpt2", "GPT2LMHeadModel", "transformer.", "n_positions"
    tied_by_default = has_dropout = True
    fixed: ClassVar[dict[str, Any]] = {
        "position": "learned", "norm": "layernorm", "norm_placement": "pre", "feed_forward": "gelu", "bias": True,
        "qk_norm": False, "sliding_window": None,
    }  # fmt: skip
    configurable = frozenset({"n_kv_head", "head_dim"})  # checked in ``unsupported_settings``

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        fields.allow_only("activation_function", "gelu_new", "gelu_pytorch_tanh")
        fields.allow_only("scale_attn_weights", True)
        fields.allow_only("scale_attn_by_inverse_layer_idx", False)
        fields.allow_only("sliding_window")
        dropouts = [fields.number(name, 0.1) for name in DROPOUT_FIELDS]
        if len(set(dropouts)) > 1:
            found = ", ".join(f"{name} is {p}" for name, p in zip(DROPOUT_FIELDS, dropouts, strict=True))
            fields.unsupported.append(f"{found} (they must be equal)")
        width = fields.positive_int("n_embd")
        return {
            **self.fixed,
            "n_layer": fields.positive_int("n_layer"),
            "n_head": fields.positive_int("n_head"),
            "n_embd": width,
            "ffn_dim": fields.positive_int("n_inner", 4 * width, 4 * width),
            "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
            "dropout": dropouts[0],
            "initialisation": "gpt2",
        }

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        gpt = shape.gpt
        return {
            "n_embd": gpt.n_embd,
            "n_layer": gpt.n_layer,
            "n_head": gpt.n_head,
            "n_inner": gpt.ffn_width,
            "n_positions": shape.block_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": gpt.norm_eps,
            **dict.fromkeys(DROPOUT_FIELDS, gpt.dropout),
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        }

    @override
    def tensor_mappings(self, gpt: GPTConfig) -> Iterator[TensorMapping]:
        yield TensorMapping("transformer.wte.weight", (EMBEDDING,))
        yield TensorMapping("transformer.wpe.weight", ("position.table.weight",))
        for layer in range(gpt.n_layer):
            for kind in ("weight", "bias"):
                inner = {f"{m}.{kind}": tuple(f"{name}.{kind}" for name in ours) for m, ours in MODULE_NAMES.items()}
                for hf_name, names in map_layer_names("transformer.h.{}.", layer, {**inner}):
                    yield TensorMapping(hf_name, names, transposed=kind == "weight" and "ln_" not in hf_name)
        for kind in ("weight", "bias"):
            yield TensorMapping(f"transformer.ln_f.{kind}", (NORM.replace("weight", kind),))

    @override
    def unsupported_settings(self, gpt: GPTConfig) -> list[str]:
        found = super().unsupported_settings(gpt)
        if gpt.kv_heads != gpt.n_head:
            found.append(f"n_kv_head is {gpt.kv_heads} (must equal n_head, {gpt.n_head})")
        if gpt.head_width * gpt.n_head != gpt.n_embd:
            found.append(f"head_dim is {gpt.head_width} (must equal n_embd / n_head, {gpt.n_embd / gpt.n_head:g})")
        return found
