"""Several documents in one window: who sees whom, and where each token stands in its own."""

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._triton import has_triton

NARROWEST: Final = 16
"""Channels of a head that FlexAttention's kernels need."""


class Documents(NamedTuple):
    """What the parts of the model need to know of the documents in a batch.

    Attributes:
        positions: (B, T) int64, of each token in its document, from 0.
        mask: What attention may see: (B, 1, T, T) bool, true for the token itself and those before it in its document;
            or the same as blocks, for FlexAttention.
    """

    positions: Tensor
    mask: Tensor | BlockMask


def can_use_blocks(device: torch.device, head_width: int) -> bool:
    """Whether FlexAttention can train there: it drops no weights, has no backward on a CPU, and needs Triton."""
    return device.type == "cuda" and head_width >= NARROWEST and has_triton()


def documents(document_ids: Tensor, dense: bool) -> Documents:
    """Work them out.

    Args:
        document_ids: (B, T) int64, another number for each document; its tokens stand side by side.
        dense: Whether attention needs the mask as a tensor.
    """
    B, T = document_ids.shape
    place = torch.arange(T, device=document_ids.device)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    positions = place - torch.where(begins, place, 0).cummax(dim=1).values  # (B, T)
    if dense:
        same = document_ids[:, None, :, None] == document_ids[:, None, None, :]  # (B, 1, T, T)
        return Documents(positions, same & (place[:, None] >= place))

    def visible(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[b, query] == document_ids[b, key])

    return Documents(
        positions, create_block_mask(visible, B, None, T, T, device=document_ids.device, _compile=document_ids.is_cuda)
    )
