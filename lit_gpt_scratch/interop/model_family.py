"""Base class for model families that convert configs and weights between Hugging Face and this package."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.interop.hf_rope import read_context
from lit_gpt_scratch.interop.tensor_stream import LazyTensors
from lit_gpt_scratch.model import GPTConfig

COMMON_FIELDS: Final = frozenset({
    "n_layer", "n_head", "n_embd", "ffn_dim", "norm_eps", "tied_embeddings", "vocab_multiple", "initialisation",
    "dropout", "attention_backend", "rotary_base", "rotary_factor", "rotary_trained_context", "rotary_slow",
    "rotary_fast", "rotary_truncate", "rotary_short_factors", "rotary_long_factors", "n_experts", "experts_per_token",
    "load_balance_loss", "router_z_loss",
})  # fmt: skip
"""``GPTConfig`` fields that every family can express, or that do not affect a trained model's output."""
NEUTRAL_VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "quantization_config": (), "auto_map": (), "attn_logit_softcapping": (), "final_logit_softcapping": (),
    "num_experts": (0,), "num_local_experts": (0,), "partial_rotary_factor": (1,), "is_encoder_decoder": (False,),
    "add_cross_attention": (False,), "use_qk_norm": (False,), "use_sliding_window": (False,),
    "is_causal": (True,),
}  # fmt: skip
"""``config.json`` fields that can change the computation, mapped to the values that leave it unchanged."""
EMBEDDING, HEAD, NORM = "embedding.weight", "head.weight", "norm.weight"


class TensorMapping(NamedTuple):
    """Mapping between a Hugging Face tensor and one or more tensors of this package.

    Attributes:
        hf_name: Name in the Hugging Face file.
        names: Names in this package's state dict; if there are several, the tensors are concatenated along dimension 0.
        transposed: Whether the file stores the weight as (..., in_features, out_features), like Conv1D in GPT-2.
        interleaved: Whether the tensors have a first dimension for the expert, and are interleaved along the next one,
            that of the output channels, instead of concatenated.
        stack_index: Index along dimension 0 of the tensor of this package, or None if the tensor is a whole one.
        rows: Number of rows of each of the concatenated tensors, or None if they are equal.
    """

    hf_name: str
    names: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    stack_index: int | None = None
    rows: tuple[int, ...] | None = None


class ModelShape(NamedTuple):
    """Arguments of ``GPT``: config, vocabulary size, and context length in tokens."""

    gpt: GPTConfig
    vocab_size: int
    block_size: int


class ModelFamily(ABC):
    """Base class for Hugging Face model families; each subclass implements one ``model_type``.

    Attributes:
        model_type: Value of ``model_type`` in ``config.json``.
        architecture: Name of the corresponding ``transformers`` class.
        prefix: Prefix of all tensor names except the head's; absent from files that were saved without the head.
        context_field: Name of the ``config.json`` field with the context length.
        tied_by_default: Whether the embeddings are tied if ``config.json`` does not contain ``tie_word_embeddings``.
        has_dropout: Whether the family applies dropout in the same places as this package.
        fixed: Map from the ``GPTConfig`` fields that have a single supported value to that value. Fields that are in
            none of ``fixed``, ``configurable`` and ``COMMON_FIELDS`` must have their default values.
        configurable: ``GPTConfig`` fields that the family can express in addition to ``COMMON_FIELDS``.
        reads: Fields in ``NEUTRAL_VALUES`` whose other values the family supports, too.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str]
    context_field: ClassVar[str] = "max_position_embeddings"
    tied_by_default: ClassVar[bool] = False
    has_dropout: ClassVar[bool] = False
    fixed: ClassVar[dict[str, Any]]
    configurable: ClassVar[frozenset[str]] = frozenset()
    reads: ClassVar[frozenset[str]] = frozenset()

    def read_config(self, fields: HFConfigReader) -> ModelShape:
        """Convert a ``config.json`` to a ``ModelShape``.

        Raises:
            UserError: A field is missing or invalid, or its value is not supported.
        """
        for name, neutral in NEUTRAL_VALUES.items():
            if name not in self.reads:
                fields.allow_only(name, *neutral)
        config = self.parse_config(fields)
        layer_type = "full_attention" if config.get("sliding_window") is None else "sliding_attention"
        layers = fields.values.get("layer_types")
        is_uniform = isinstance(layers, list) and all(layer == layer_type for layer in layers)
        if layers is not None and not is_uniform and "sliding_window_pattern" not in self.configurable:
            fields.reject("layer_types", f"only {layer_type} in every layer")
        config["tied_embeddings"] = fields.boolean("tie_word_embeddings", self.tied_by_default)
        vocab_size, block_size = fields.positive_int("vocab_size"), fields.positive_int(self.context_field)
        fields.raise_if_unsupported()
        try:
            gpt = GPTConfig(**config)
            return ModelShape(gpt, vocab_size, read_context(gpt, block_size))
        except UserError as error:
            raise UserError(f"{fields.path} describes a model that is not supported: {error}") from error

    @abstractmethod
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        """Convert the fields of a ``config.json`` to fields of ``GPTConfig``, except for ``tied_embeddings``."""

    @abstractmethod
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        """Build the ``config.json`` fields that are specific to the family."""

    @abstractmethod
    def tensor_mappings(self, gpt: GPTConfig) -> Iterator[TensorMapping]:
        """Iterate over the mappings of all tensors except the output head."""

    def unsupported_settings(self, gpt: GPTConfig) -> list[str]:
        """Return a description of each ``GPTConfig`` setting that the family does not support."""
        gpt = replace(gpt, qkv_bias=gpt.qkv_bias and not gpt.bias)  # which includes it
        found = []
        for field in dataclass_fields(GPTConfig):
            value, required = getattr(gpt, field.name), self.fixed.get(field.name, field.default)
            if field.name not in COMMON_FIELDS | self.configurable and value != required:
                found.append(f"{field.name} is {value} (must be {required})")
        return found

    def all_tensor_mappings(self, gpt: GPTConfig) -> Iterator[TensorMapping]:
        """Iterate over the mappings of all tensors. A tied head has no mapping, since it has no separate tensor."""
        yield from self.tensor_mappings(gpt)
        if not gpt.tied_embeddings:
            yield TensorMapping("lm_head.weight", (HEAD,))

    def to_hf_weights(self, gpt: GPTConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Convert a state dict of ``GPT``, one tensor at a time, to the family's tensor names and layouts."""
        for mapping in self.all_tensor_mappings(gpt):
            parts = [
                weights[name] if mapping.stack_index is None else weights[name][mapping.stack_index]
                for name in mapping.names
            ]
            if mapping.interleaved:
                tensor = torch.stack(parts, dim=2).flatten(1, 2)  # (n_experts, len(parts) * out_features, ...)
            else:
                tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            yield mapping.hf_name, (tensor.mT if mapping.transposed else tensor).contiguous()

    def from_hf_weights(self, gpt: GPTConfig, weights: LazyTensors) -> LazyTensors:
        """Convert the family's tensors to a state dict of ``GPT``. This is the inverse of ``to_hf_weights``.

        The state dict includes the head even if it is tied to the embedding.
        """
        source: dict[str, list[tuple[TensorMapping, int]]] = {}
        for mapping in self.all_tensor_mappings(gpt):
            for part, name in enumerate(mapping.names):
                source.setdefault(name, []).append((mapping, part))
        if gpt.tied_embeddings:
            source[HEAD] = source[EMBEDDING]

        def convert(name: str, weights: Mapping[str, Tensor]) -> Tensor:
            tensors = []
            for mapping, part in source[name]:
                tensor = weights[mapping.hf_name].mT if mapping.transposed else weights[mapping.hf_name]
                if mapping.interleaved:
                    tensors.append(tensor[:, part :: len(mapping.names)])
                    continue
                parts = torch.split(tensor, [*mapping.rows]) if mapping.rows else tensor.chunk(len(mapping.names))
                tensors.append(parts[part])
            if source[name][0][0].stack_index is not None:
                return torch.stack(tensors)
            return tensors[0].clone(memory_format=torch.contiguous_format)

        shapes = {name: convert(name, weights.on_meta) for name in source}
        return LazyTensors(shapes, lambda name: convert(name, weights))


def map_layer_names(
    template: str, layer: int, names: dict[str, tuple[str, ...] | str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Iterate over the full names of a layer's tensors as pairs (Hugging Face name, names in this package).

    Args:
        template: Prefix of the Hugging Face names, with ``{}`` for the layer index.
        layer: Index of the layer.
        names: Map from Hugging Face names to names in this package, both without the layer prefix.
    """
    for hf_name, ours in names.items():
        inner = (ours,) if isinstance(ours, str) else ours
        yield template.format(layer) + hf_name, tuple(f"blocks.{layer}.{name}" for name in inner)
