"""What a family of published models is to this package: a config in other words, and tensors under other names."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_config import HFConfigReader
from lit_gpt_scratch.model import GPTConfig

COMMON_FIELDS: Final = frozenset({
    "n_layer", "n_head", "n_embd", "ffn_dim", "norm_eps", "tied_embeddings", "vocab_multiple", "initialisation",
    "dropout", "attention_backend", "rotary_base", "rotary_factor", "rotary_trained_context", "rotary_slow",
    "rotary_fast",
})  # fmt: skip
"""Switches that every family either can say, or that change nothing in what a trained model computes."""
NEUTRAL_VALUES: Final[dict[str, tuple[Any, ...]]] = {
    "quantization_config": (), "auto_map": (), "attn_logit_softcapping": (), "final_logit_softcapping": (),
    "num_experts": (0,), "num_local_experts": (0,), "partial_rotary_factor": (1,), "is_encoder_decoder": (False,),
    "add_cross_attention": (False,), "use_qk_norm": (False,), "use_sliding_window": (False,),
}  # fmt: skip
"""Fields that change what a model computes in some family, and the values with which they do not."""
EMBEDDING, HEAD, NORM = "embedding.weight", "head.weight", "norm.weight"


class TensorMapping(NamedTuple):
    """A tensor of theirs and what it is made of.

    Attributes:
        theirs: Its name.
        ours: Names here; of several, the rows stand one below the other.
        transposed: They keep one row an input, as the first GPTs did.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


class ModelShape(NamedTuple):
    """All that a network is built from."""

    gpt: GPTConfig
    vocab_size: int
    block_size: int


class ModelFamily(ABC):
    """One ``model_type``.

    Attributes:
        model_type: Its name in ``config.json``.
        architecture: The class that ``transformers`` builds.
        prefix: What the names of all tensors but the head's begin with; bare files leave it out.
        context: The field with the longest window.
        tied: Whether embeddings are tied where ``config.json`` does not say.
        drops: Whether it drops out what this package does.
        fixed: Switches that it has only one value of; those neither here nor free stay as they are by default.
        free: Switches that it can say, beside ``COMMON_FIELDS``.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str]
    context: ClassVar[str] = "max_position_embeddings"
    tied: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    fixed: ClassVar[dict[str, Any]]
    free: ClassVar[frozenset[str]] = frozenset()

    def read_config(self, fields: HFConfigReader) -> ModelShape:
        """What a ``config.json`` describes.

        Raises:
            UserError: A field is missing, is none, or asks for what there is no switch for.
        """
        for name, harmless in NEUTRAL_VALUES.items():
            fields.allow_only(name, *harmless)
        switches = self.parse_config(fields)
        kind = "full_attention" if switches.get("sliding_window") is None else "sliding_attention"
        layers = fields.values.get("layer_types")
        if layers is not None and not (isinstance(layers, list) and all(layer == kind for layer in layers)):
            fields.reject("layer_types", f"here {kind} in every layer")
        switches["tied_embeddings"] = fields.boolean("tie_word_embeddings", self.tied)
        vocab_size, block_size = fields.positive_int("vocab_size"), fields.positive_int(self.context)
        fields.raise_if_unsupported()
        try:
            return ModelShape(GPTConfig(**switches), vocab_size, block_size)
        except UserError as error:
            raise UserError(f"{fields.path} describes no model of this package: {error}") from error

    @abstractmethod
    def parse_config(self, fields: HFConfigReader) -> dict[str, Any]:
        """Fields of ``GPTConfig``, without ``tied_embeddings``."""

    @abstractmethod
    def build_config(self, shape: ModelShape) -> dict[str, Any]:
        """The fields of ``config.json`` that are the family's own."""

    @abstractmethod
    def tensor_mappings(self, gpt: GPTConfig) -> Iterator[TensorMapping]:
        """Every tensor but the head's."""

    def unsupported_settings(self, gpt: GPTConfig) -> list[str]:
        """What of a config the family has no words for. A switch that is new to all families is among it."""
        found = []
        for field in dataclass_fields(GPTConfig):
            value, wanted = getattr(gpt, field.name), self.fixed.get(field.name, field.default)
            if field.name not in COMMON_FIELDS | self.free and value != wanted:
                found.append(f"{field.name} is {value} (there {wanted})")
        return found

    def all_tensor_mappings(self, gpt: GPTConfig) -> Iterator[TensorMapping]:
        """Every tensor; a tied head is none of its own."""
        yield from self.tensor_mappings(gpt)
        if not gpt.tied_embeddings:
            yield TensorMapping("lm_head.weight", (HEAD,))

    def to_hf_weights(self, gpt: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the names, and in the order of rows and columns, that the family has."""
        made = {}
        for piece in self.all_tensor_mappings(gpt):
            parts = [weights[name] for name in piece.ours]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            made[piece.theirs] = (tensor.T if piece.transposed else tensor).contiguous()
        return made

    def from_hf_weights(self, gpt: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of ``to_hf_weights``; a tied head is there a second time, as in a state dict of the network."""
        made = {}
        for piece in self.all_tensor_mappings(gpt):
            tensor = weights[piece.theirs].T if piece.transposed else weights[piece.theirs]
            for name, part in zip(piece.ours, tensor.chunk(len(piece.ours)), strict=True):
                made[name] = part.contiguous()
        if gpt.tied_embeddings:
            made[HEAD] = made[EMBEDDING]
        return made


def map_layer_names(
    template: str, layer: int, names: dict[str, tuple[str, ...] | str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of one layer, theirs to ours, each behind what names of the layer begin with."""
    for theirs, ours in names.items():
        inner = (ours,) if isinstance(ours, str) else ours
        yield template.format(layer) + theirs, tuple(f"blocks.{layer}.{name}" for name in inner)
