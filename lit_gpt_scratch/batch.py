"""The contract between what makes batches (``data``) and what learns from them (``tasks``)."""

from typing import Final, TypedDict

from torch import Tensor

IGNORED: Final = -100
"""Label of a position that is not scored, PyTorch's own convention."""


class Batch(TypedDict):
    """``B`` windows of ``T`` tokens.

    ``labels[b, t]`` is the token that follows ``input_ids[b, t]``: they are shifted once, where the
    batch is made, and nowhere else. A label of ``IGNORED`` (-100) is not scored.
    """

    input_ids: Tensor
    """(B, T) int64"""
    labels: Tensor
    """(B, T) int64"""
