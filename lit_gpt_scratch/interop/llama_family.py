"""Convert model families with the Llama architecture: rotary position embeddings, RMSNorm, SwiGLU."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, ClassVar

from typing_extensions import override

from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.interop.hf_rope import DEFAULT_THETA, read_rope, write_context, write_rope
from lit_gpt_scratch.interop.model_family import (
    EMBEDDING,
    NORM,
    ModelFamily,
    ModelShape,
    TensorMapping,
    map_layer_names,
)
from lit_gpt_scratch.model import GPTConfig

LINEAR_NAMES = {
    "self_attn.q_proj": "attention.query", "self_attn.k_proj": "attention.key", "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output", "mlp.gate_proj": "feed_forward.gate", "mlp.up_proj": "feed_forward.input",
    "mlp.down_proj": "feed_forward.output",
}  # fmt: skip
"""Map from the Hugging Face names of a block's linear layers to the names in this package."""
NO_PADDING = {"pad_token_id": None}
"""Overrides the default of some families; the embedding of that token would otherwise receive no gradient."""
ATTENTION_NAMES = {hf_name: name for hf_name, name in LINEAR_NAMES.items() if hf_name.startswith("self_attn")}
QKV_NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
"""Hugging Face names of the projections to queries, keys and values."""


class LlamaLikeFamily(ModelFamily):
    """Base class for model families with the Llama architecture.

    Attributes:
        default_kv_heads: Number of key/value heads if ``config.json`` does not specify it; None uses the number of
            attention heads.
        default_head_dim: Head dimension if ``config.json`` does not specify it; None uses the hidden size divided by
            the number of attention heads.
        default_norm_eps: Epsilon of the norms if ``config.json`` does not specify it.
        default_theta: Base of the rotation frequencies if ``config.json`` does not specify it.
        heads_divide_width: Whether ``transformers`` requires the hidden size to be a multiple of the number of
            attention heads, even if ``head_dim`` is set.
        activation_field: Name of the ``config.json`` field with the activation function of the gate.
        activations: Supported values of this field; the first is exported.
        norm_names: Map from the Hugging Face names of a block's norms to the names in this package.
        linear_names: Map from the Hugging Face names of a block's linear layers to the names in this package; several
            layers of this package may be one layer there.
        expert_names: Map from the Hugging Face names of an expert's linear layers, with ``{}`` for its index, to the
            names in this package.
        partial_rotation: Whether the family can rotate only a fraction of the channels.
    """

    prefix = "model."
    default_kv_heads: ClassVar[int | None] = None
    default_head_dim: ClassVar[int | None] = None
    default_norm_eps: ClassVar[float] = 1e-6
    default_theta: ClassVar[float] = DEFAULT_THETA
    heads_divide_width: ClassVar[bool] = False
    activation_field: ClassVar[str] = "hidden_act"
    activations: ClassVar[tuple[str, ...]] = ("silu", "swish")
    norm_names: ClassVar[dict[str, tuple[str, ...] | str]] = {
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "feed_forward_norm.weight",
    }
    linear_names: ClassVar[Mapping[str, tuple[str, ...] | str]] = LINEAR_NAMES
    expert_names: ClassVar[dict[str, str]] = {}
    partial_rotation: ClassVar[bool] = False
    fixed: ClassVar[dict[str, Any]] = {
        "position": "rotary", "norm": "rmsnorm", "norm_placement": "pre", "feed_forward": "swiglu", "bias": False,
        "qkv_bias": False, "qk_norm": False, "sliding_window": None, "rotary_share": 1.0,
    }  # fmt: skip
    configurable = frozenset({"n_kv_head", "head_dim", "rotary_scaling"})

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        heads, width = fields.positive_int("num_attention_heads"), fields.positive_int("hidden_size")
        fields.allow_only(self.activation_field, *self.activations)
        fields.allow_only("attention_dropout", 0)
        return {
            **self.fixed,
            "n_layer": fields.positive_int("num_hidden_layers"),
            "n_head": heads,
            "n_embd": width,
            "n_kv_head": fields.positive_int("num_key_value_heads", self.default_kv_heads or heads, heads),
            "head_dim": fields.positive_int("head_dim", self.default_head_dim or width // heads, width // heads),
            "ffn_dim": fields.positive_int("intermediate_size"),
            "norm_eps": fields.number("rms_norm_eps", self.default_norm_eps),
            "initialisation": "normal",
            **self.parse_rope(fields),
        }

    def parse_rope(self, fields: HFConfigReader) -> dict[str, Any]:
        """Convert the settings of the rotary position embeddings to fields of ``GPTConfig``."""
        return read_rope(fields, self.default_theta, self.partial_rotation)

    def build_rope(self, gpt: GPTConfig) -> dict[str, Any]:
        """Build the value of ``rope_parameters``."""
        return write_rope(gpt)

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        gpt = shape.gpt
        return {
            "hidden_size": gpt.n_embd,
            "intermediate_size": gpt.ffn_width,
            "num_hidden_layers": gpt.n_layer,
            "num_attention_heads": gpt.n_head,
            "num_key_value_heads": gpt.kv_heads,
            "head_dim": gpt.head_width,
            self.activation_field: self.activations[0],
            "max_position_embeddings": write_context(gpt, shape.block_size),
            "rms_norm_eps": gpt.norm_eps,
            "rope_parameters": self.build_rope(gpt),
            "attention_dropout": 0.0,
        }

    @override
    def tensor_mappings(self, gpt: GPTConfig) -> Iterator[TensorMapping]:
        biased = [*self.linear_names] if gpt.bias else QKV_NAMES if gpt.qkv_bias else []
        linear = {
            f"{hf_name}.{kind}": _parameter_names(self.linear_names[hf_name], kind)
            for kind, hf_names in (("weight", self.linear_names), ("bias", biased))
            for hf_name in hf_names
        }
        yield TensorMapping("model.embed_tokens.weight", (EMBEDDING,))
        for layer in range(gpt.n_layer):
            for hf_name, names in map_layer_names("model.layers.{}.", layer, {**self.norm_names, **linear}):
                yield TensorMapping(hf_name, names)
            for expert, (hf_name, ours) in product(range(gpt.n_experts), self.expert_names.items()):
                hf_name = f"model.layers.{layer}.{hf_name.format(expert)}.weight"
                yield TensorMapping(
                    hf_name, (f"blocks.{layer}.feed_forward.experts.{ours}.weight",), stack_index=expert
                )
        yield TensorMapping("model.norm.weight", (NORM,))

    @override
    def unsupported_settings(self, gpt: GPTConfig) -> list[str]:
        found = super().unsupported_settings(gpt)
        if self.heads_divide_width and gpt.n_embd % gpt.n_head:
            found.append(f"n_embd is {gpt.n_embd} (must be a multiple of n_head, which is {gpt.n_head})")
        return found


class LlamaFamily(LlamaLikeFamily):
    """Llama 1, 2 and 3 models (https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783)."""

    model_type, architecture = "llama", "LlamaForCausalLM"
    heads_divide_width = True
    configurable = LlamaLikeFamily.configurable | {"bias"}

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        attention, feed_forward = fields.boolean("attention_bias", False), fields.boolean("mlp_bias", False)
        if attention != feed_forward:
            fields.reject("attention_bias", f"must be equal to mlp_bias, which is {feed_forward}")
        fields.allow_only("sliding_window")
        return super().parse_config(fields) | {"bias": attention}

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        return super().build_config(shape) | {"attention_bias": shape.gpt.bias, "mlp_bias": shape.gpt.bias}


class MistralFamily(LlamaLikeFamily):
    """Dense Mistral models (https://arxiv.org/abs/2310.06825), with a sliding window in early models only."""

    model_type, architecture = "mistral", "MistralForCausalLM"
    default_kv_heads = 8
    configurable = LlamaLikeFamily.configurable | {"sliding_window"}

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        fields.allow_only("attention_bias", False)
        fields.allow_only("mlp_bias", False)
        unlimited = fields.values.get("sliding_window", 0) is None
        return super().parse_config(fields) | {
            "sliding_window": None if unlimited else fields.positive_int("sliding_window", default=4096)
        }

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        return super().build_config(shape) | {"sliding_window": shape.gpt.sliding_window}


class Qwen2Family(LlamaLikeFamily):
    """Qwen2 and Qwen2.5 models (https://arxiv.org/abs/2407.10671), with biases of the queries, keys and values only."""

    model_type, architecture = "qwen2", "Qwen2ForCausalLM"
    default_kv_heads = 32
    fixed = LlamaLikeFamily.fixed | {"qkv_bias": True}

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        layers = shape.gpt.n_layer
        return super().build_config(shape) | {
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": layers,
            "layer_types": ["full_attention"] * layers,
        }


class Qwen3Family(Qwen2Family):
    """Dense Qwen3 models (https://arxiv.org/abs/2505.09388), which normalize queries and keys per head."""

    model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    default_head_dim: ClassVar[int | None] = 128
    norm_names = {  # noqa: RUF012 - annotated as a ClassVar in LlamaLikeFamily
        **LlamaLikeFamily.norm_names,
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
        return super().build_config(shape) | {"attention_bias": False}


class MixtralFamily(MistralFamily):
    """Mixtral models (https://arxiv.org/abs/2401.04088): Mistral with a mixture of experts."""

    model_type, architecture = "mixtral", "MixtralForCausalLM"
    default_norm_eps = 1e-5
    default_theta = 1_000_000.0
    reads = frozenset({"num_local_experts"})
    linear_names: ClassVar[Mapping[str, tuple[str, ...] | str]] = ATTENTION_NAMES | {
        "block_sparse_moe.gate": "feed_forward.router"
    }
    expert_names: ClassVar[dict[str, str]] = {
        "block_sparse_moe.experts.{}.w1": "gate",
        "block_sparse_moe.experts.{}.w2": "output",
        "block_sparse_moe.experts.{}.w3": "input",
    }
    fixed = MistralFamily.fixed | {"feed_forward": "moe"}

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        fields.allow_only("router_jitter_noise", 0)
        unlimited = fields.values.get("sliding_window") is None
        return super().parse_config(fields) | {
            "sliding_window": None if unlimited else fields.positive_int("sliding_window"),
            "n_experts": fields.positive_int("num_local_experts", 8),
            "experts_per_token": fields.positive_int("num_experts_per_tok", 2),
        }

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        return super().build_config(shape) | {
            "num_local_experts": shape.gpt.n_experts,
            "num_experts_per_tok": shape.gpt.experts_per_token,
            "router_jitter_noise": 0.0,
        }


class Qwen3MoEFamily(Qwen3Family):
    """Qwen3 models with a mixture of experts in every block (https://arxiv.org/abs/2505.09388)."""

    model_type, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
    default_kv_heads = 4
    default_head_dim = None
    reads = frozenset({"num_experts", "num_local_experts"})
    linear_names: ClassVar[Mapping[str, tuple[str, ...] | str]] = ATTENTION_NAMES | {"mlp.gate": "feed_forward.router"}
    expert_names: ClassVar[dict[str, str]] = {
        "mlp.experts.{}.gate_proj": "gate", "mlp.experts.{}.down_proj": "output", "mlp.experts.{}.up_proj": "input",
    }  # fmt: skip
    fixed = Qwen3Family.fixed | {"feed_forward": "moe"}
    configurable = Qwen3Family.configurable | {"normalize_gates"}

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        fields.allow_only("decoder_sparse_step", 1)
        fields.allow_only("mlp_only_layers", [])
        count = "num_experts" if fields.values.get("num_experts") is not None else "num_local_experts"
        return super().parse_config(fields) | {
            "n_experts": fields.positive_int(count, 128),
            "experts_per_token": fields.positive_int("num_experts_per_tok", 8),
            "ffn_dim": fields.positive_int("moe_intermediate_size", 768),
            "normalize_gates": fields.boolean("norm_topk_prob", False),
        }

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        return super().build_config(shape) | {
            "num_experts": shape.gpt.n_experts,
            "num_experts_per_tok": shape.gpt.experts_per_token,
            "moe_intermediate_size": shape.gpt.ffn_width,
            "norm_topk_prob": shape.gpt.normalize_gates,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }


class Olmo2Family(LlamaLikeFamily):
    """OLMo 2 models (https://arxiv.org/abs/2501.00656), which normalize outputs, and all queries and keys together."""

    model_type, architecture = "olmo2", "Olmo2ForCausalLM"
    default_norm_eps = 1e-5
    norm_names: ClassVar[dict[str, tuple[str, ...] | str]] = {
        "post_attention_layernorm.weight": "attention_end.weight",
        "post_feedforward_layernorm.weight": "feed_forward_end.weight",
        "self_attn.q_norm.weight": "attention.query_norm.weight",
        "self_attn.k_norm.weight": "attention.key_norm.weight",
    }
    fixed = LlamaLikeFamily.fixed | {"norm_placement": "output", "qk_norm": True, "qk_norm_joint": True}

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        fields.allow_only("attention_bias", False)
        return super().parse_config(fields)

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        return super().build_config(shape) | {"attention_bias": False, **NO_PADDING}


class Phi3Family(LlamaLikeFamily):
    """Phi-3 and Phi-4 models (https://arxiv.org/abs/2404.14219), which store several matrices as one."""

    model_type, architecture = "phi3", "Phi3ForCausalLM"
    default_norm_eps = 1e-5
    linear_names: ClassVar[Mapping[str, tuple[str, ...] | str]] = {
        "self_attn.qkv_proj": ("attention.query", "attention.key", "attention.value"),
        "self_attn.o_proj": "attention.output",
        "mlp.gate_up_proj": ("feed_forward.gate", "feed_forward.input"),
        "mlp.down_proj": "feed_forward.output",
    }
    partial_rotation = True
    reads = frozenset({"partial_rotary_factor"})
    configurable = LlamaLikeFamily.configurable | {"rotary_share", "sliding_window"}

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
            fields.allow_only(name, False)
        for name in ("resid_pdrop", "embd_pdrop"):
            fields.allow_only(name, 0)
        # The default of transformers takes precedence over a value in rope_parameters.
        fields.values.setdefault("original_max_position_embeddings", 4096)
        window = fields.values.get("sliding_window") and fields.positive_int("sliding_window")
        config = super().parse_config(fields) | {"sliding_window": window}
        if config.get("rotary_scaling") not in (None, "longrope"):
            fields.reject("rope_parameters", "rope_type must be default or longrope")
        if (width := config["n_embd"] // config["n_head"]) != config["head_dim"]:
            fields.reject("head_dim", f"must be hidden_size / num_attention_heads, {width}")
        if (rotated := config["head_dim"] * config["rotary_share"]) != int(rotated):
            fields.reject("partial_rotary_factor", f"must be a fraction of the {width} channels of a head")
        return config

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        return super().build_config(shape) | {
            **NO_PADDING,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "original_max_position_embeddings": shape.gpt.rotary_trained_context or shape.block_size,
            "sliding_window": shape.gpt.sliding_window,
        }

    @override
    def unsupported_settings(self, gpt: GPTConfig) -> list[str]:
        found = super().unsupported_settings(gpt)
        if gpt.rotary_scaling not in (None, "ntk", "longrope"):
            found.append(f"rotary_scaling is {gpt.rotary_scaling} (must be longrope, ntk or None)")
        if gpt.head_width * gpt.n_head != gpt.n_embd:
            found.append(f"head_dim is {gpt.head_width} (must equal n_embd / n_head, {gpt.n_embd / gpt.n_head:g})")
        if int(gpt.head_width * gpt.rotary_share) != gpt.rotary_width:
            found.append(f"rotary_share is {gpt.rotary_share} (must be a fraction of the {gpt.head_width} channels)")
        return found

    @override
    def tensor_mappings(self, gpt: GPTConfig) -> Iterator[TensorMapping]:
        queries, keys = gpt.n_head * gpt.head_width, gpt.kv_heads * gpt.head_width
        for mapping in super().tensor_mappings(gpt):
            fused = mapping.hf_name.endswith("qkv_proj.weight")
            yield mapping._replace(rows=(queries, keys, keys)) if fused else mapping


class SmolLM3Family(LlamaLikeFamily):
    """SmolLM3 models (https://huggingface.co/HuggingFaceTB/SmolLM3-3B), in which some blocks encode no positions."""

    model_type, architecture = "smollm3", "SmolLM3ForCausalLM"
    tied_by_default = True
    default_kv_heads = 4
    default_theta = 2_000_000.0
    configurable = LlamaLikeFamily.configurable | {"rotary_skip_every"}

    @override
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        fields.allow_only("attention_bias", False)
        fields.allow_only("mlp_bias", False)
        n_layer, rotates = fields.positive_int("num_hidden_layers"), fields.values.get("no_rope_layers")
        if rotates is None:
            every = fields.positive_int("no_rope_layer_interval", 4)
        elif not isinstance(rotates, list) or len(rotates) < n_layer:
            fields.reject("no_rope_layers", f"must be a list with an element for each of the {n_layer} layers")
            every = n_layer + 1
        else:
            rotates = rotates[:n_layer]
            every = rotates.index(0) + 1 if 0 in rotates else n_layer + 1
            if rotates != _rotates(n_layer, every):
                fields.reject("no_rope_layers", f"only 0 in every layer whose number is divisible by {every}, else 1")
        return super().parse_config(fields) | {"rotary_skip_every": every if every <= n_layer else None}

    @override
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        n_layer, every = shape.gpt.n_layer, shape.gpt.rotary_skip_every or shape.gpt.n_layer + 1
        return super().build_config(shape) | {
            **NO_PADDING,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "layer_types": ["full_attention"] * n_layer,
            "no_rope_layer_interval": every,
            "no_rope_layers": _rotates(n_layer, every),
        }


def _rotates(n_layer: int, skip_every: int) -> list[int]:
    """Return 1 for each layer that rotates its queries and keys, and 0 for the others."""
    return [int((layer + 1) % skip_every != 0) for layer in range(n_layer)]


def _parameter_names(modules: tuple[str, ...] | str, kind: str) -> tuple[str, ...]:
    """Return the names of the weights or biases of one or several modules."""
    return tuple(f"{module}.{kind}" for module in ((modules,) if isinstance(modules, str) else modules))
