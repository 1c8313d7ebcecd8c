"""Attention classes by name. To add another one, subclass ``Attention`` and add the subclass to ``ATTENTIONS``."""

from typing import Final

from lit_gpt_scratch.model.attention import Attention
from lit_gpt_scratch.model.latent_attention import LatentAttention
from lit_gpt_scratch.trust import import_subclass

ATTENTIONS: Final[dict[str, type[Attention]]] = {"latent": LatentAttention}


def resolve_attention_class(name: str | None) -> type[Attention]:
    """Return the attention class with the given name or import path, or ``Attention`` if ``name`` is None.

    The module that defines a class with an import path is imported, which runs its code.

    Raises:
        UserError: The path cannot be imported, or does not refer to a subclass of ``Attention``.
    """
    if name is None:
        return Attention
    return ATTENTIONS.get(name) or import_subclass(name, Attention, "model.gpt.attention")
