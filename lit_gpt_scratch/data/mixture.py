"""Tokens that are made already, mixed: what can be asked of them."""

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lit_gpt_scratch.errors import UserError

ONLY_OF_TEXT: Final = (
    "source", "text_column", "config", "split", "streaming", "max_bytes", "cleaning", "validation_share", "tokenizer",
    "vocab_size", "special_tokens", "store",
)  # fmt: skip
"""Arguments that mean nothing to tokens that are made already."""


def refuse_mixture(folders: Sequence[Path], weights: Sequence[float] | None) -> None:
    """Refuse what cannot be mixed.

    Raises:
        UserError: There is no store, or a weight is out of range.
    """
    if not folders:
        raise UserError("data.mixture has no store in it; name one")
    for folder, weight in zip(folders, weights or [1.0] * len(folders), strict=True):
        if not 0.0 <= weight < math.inf:
            raise UserError(f"data.mixture: the weight of {folder} is {weight}; it must be 0 or more")
    if weights is not None and not 0 < sum(weights) < math.inf:
        raise UserError(f"data.mixture: the weights sum to {sum(weights):g}; give at least one store a weight")


def refuse_of_text(kind: type, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that say how tokens are made.

    Args:
        kind: The data module, whose signature has the defaults.
        arguments: What it was given.

    Raises:
        UserError: One of them is not its default.
    """
    for name in ONLY_OF_TEXT:
        default = inspect.signature(kind).parameters[name].default
        given = tuple(arguments[name]) if isinstance(arguments[name], list) else arguments[name]
        if given != default:
            raise UserError(f"data.mixture is of tokens that are made already; leave out data.{name}")
