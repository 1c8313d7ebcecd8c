"""The contract between what makes batches (``data``) and what learns from them (``tasks``)."""

from typing import Final

from torch import Tensor
from typing_extensions import NotRequired, TypedDict

IGNORED: Final = -100
"""Label of a position that is not scored, PyTorch's own convention."""


class Batch(TypedDict):
    """``B`` windows of ``T`` tokens.

    ``labels[b, t]`` is the token that follows ``input_ids[b, t]``: they are shifted once, where the
    batch is made, and nowhere else. A label of ``IGNORED`` (-100) is not scored.

    With ``document_ids`` a token attends only to tokens of its own document, and positions count from the first of
    them. The tokens of a document stand side by side.
    """

    input_ids: Tensor
    """(B, T) int64"""
    labels: Tensor
    """(B, T) int64"""
    document_ids: NotRequired[Tensor]
    """(B, T) int64, another number for each document of a window"""
