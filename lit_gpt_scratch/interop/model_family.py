"""What a family of published models is to this package: a config in other words, and tensors under other names."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import fields as dataclass_fields
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.interop.hf_config import Fields
from lit_gpt_scratch.model import GPTConfig

FREE: Final = frozenset({
    "n_layer", "n_head", "n_embd", "ffn_dim", "norm_eps", "tied_embeddings", "vocab_multiple", "initialisation",
    "dropout", "attention_backend", "rotary_base", "rotary_factor", "rotary_trained_context", "rotary_slow",
    "rotary_fast",
})  # fmt: skip
"""Switches that every family either can say, or that change nothing in what a trained model computes."""
ABSENT: Final[dict[str, tuple[Any, ...]]] = {
    "quantization_config": (), "auto_map": (), "attn_logit_softcapping": (), "final_logit_softcapping": (),
    "num_experts": (0,), "num_local_experts": (0,), "partial_rotary_factor": (1,), "is_encoder_decoder": (False,),
    "add_cross_attention": (False,), "use_qk_norm": (False,), "use_sliding_window": (False,),
}  # fmt: skip
"""Fields that change what a model computes in some family, and the values with which they do not."""
EMBEDDING, HEAD, NORM = "embedding.weight", "head.weight", "norm.weight"


class Piece(NamedTuple):
    """A tensor of theirs and what it is made of.

    Attributes:
        theirs: Its name.
        ours: Names here; of several, the rows stand one below the other.
        transposed: They keep one row an input, as the first GPTs did.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


class Shape(NamedTuple):
    """All that a network is built from."""

    gpt: GPTConfig
    vocab_size: int
    block_size: int


class Family(ABC):
    """One ``model_type``.

    Attributes:
        model_type: Its name in ``config.json``.
        architecture: The class that ``transformers`` builds.
        prefix: What the names of all tensors but the head's begin with; bare files leave it out.
        context: The field with the longest window.
        tied: Whether embeddings are tied where ``config.json`` does not say.
        drops: Whether it drops out what this package does.
        fixed: Switches that it has only one value of; those neither here nor free stay as they are by default.
        free: Switches that it can say, beside ``FREE_TO_CHANGE``.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str]
    context: ClassVar[str] = "max_position_embeddings"
    tied: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    fixed: ClassVar[dict[str, Any]]
    free: ClassVar[frozenset[str]] = frozenset()

    def read(self, fields: Fields) -> Shape:
        """What a ``config.json`` describes.

        Raises:
            UserError: A field is missing, is none, or asks for what there is no switch for.
        """
        for name, harmless in ABSENT.items():
            fields.only(name, *harmless)
        switches = self.switches(fields)
        kind = "full_attention" if switches.get("sliding_window") is None else "sliding_attention"
        layers = fields.values.get("layer_types")
        if layers is not None and not (isinstance(layers, list) and all(layer == kind for layer in layers)):
            fields.refuse("layer_types", f"here {kind} in every layer")
        switches["tied_embeddings"] = fields.flag("tie_word_embeddings", self.tied)
        vocab_size, block_size = fields.size("vocab_size"), fields.size(self.context)
        fields.close()
        try:
            return Shape(GPTConfig(**switches), vocab_size, block_size)
        except UserError as error:
            raise UserError(f"{fields.path} describes no model of this package: {error}") from error

    @abstractmethod
    def switches(self, fields: Fields) -> dict[str, Any]:
        """Fields of ``GPTConfig``, without ``tied_embeddings``."""

    @abstractmethod
    def write(self, shape: Shape) -> dict[str, Any]:
        """The fields of ``config.json`` that are the family's own."""

    @abstractmethod
    def pieces(self, gpt: GPTConfig) -> Iterator[Piece]:
        """Every tensor but the head's."""

    def obstacles(self, gpt: GPTConfig) -> list[str]:
        """What of a config the family has no words for. A switch that is new to all families is among it."""
        found = []
        for field in dataclass_fields(GPTConfig):
            value, wanted = getattr(gpt, field.name), self.fixed.get(field.name, field.default)
            if field.name not in FREE | self.free and value != wanted:
                found.append(f"{field.name} is {value} (there {wanted})")
        return found

    def all_pieces(self, gpt: GPTConfig) -> Iterator[Piece]:
        """Every tensor; a tied head is none of its own."""
        yield from self.pieces(gpt)
        if not gpt.tied_embeddings:
            yield Piece("lm_head.weight", (HEAD,))

    def to_theirs(self, gpt: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under the names, and in the order of rows and columns, that the family has."""
        made = {}
        for piece in self.all_pieces(gpt):
            parts = [weights[name] for name in piece.ours]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            made[piece.theirs] = (tensor.T if piece.transposed else tensor).contiguous()
        return made

    def to_ours(self, gpt: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of ``to_theirs``; a tied head is there a second time, as in a state dict of the network."""
        made = {}
        for piece in self.all_pieces(gpt):
            tensor = weights[piece.theirs].T if piece.transposed else weights[piece.theirs]
            for name, part in zip(piece.ours, tensor.chunk(len(piece.ours)), strict=True):
                made[name] = part.contiguous()
        if gpt.tied_embeddings:
            made[HEAD] = made[EMBEDDING]
        return made


def layered(
    template: str, layer: int, names: dict[str, tuple[str, ...] | str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of one layer, theirs to ours, each behind what names of the layer begin with."""
    for theirs, ours in names.items():
        inner = (ours,) if isinstance(ours, str) else ours
        yield template.format(layer) + theirs, tuple(f"blocks.{layer}.{name}" for name in inner)
