"""Where the tokens of a batch stand, and what each may see of the others: worked out once for all blocks."""

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._triton import has_triton

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.positions import Position

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig
    from lit_gpt_scratch.model.kv_cache import KVCache

NARROWEST: Final = 16
"""Channels of a head that FlexAttention's kernels need."""


class Layout(NamedTuple):
    """What the parts of the model need to know of the order of the tokens.

    Attributes:
        positions: Of each token in its document, from 0, int64: (T,) where all rows are alike, else (B, T).
        rotation: What the position scheme's ``rotate`` wants to know of them.
        mask: What attention may see; None is the token itself and all before it. Dense it is (1 or B, 1, T, S) bool, or
            (1 or B, 1 or n_head, T, S) float, which is added to the scores; or it is the blocks of FlexAttention.
    """

    positions: Tensor
    rotation: tuple[Tensor, Tensor] | None
    mask: Tensor | BlockMask | None


def can_use_blocks(config: "GPTConfig", device: torch.device) -> bool:
    """Whether FlexAttention can train there: it drops no weights, has no backward on a CPU, and needs Triton."""
    return device.type == "cuda" and config.head_width >= NARROWEST and not config.dropout and has_triton()


def refuse_backend(config: "GPTConfig", device: torch.device) -> None:
    """Refuse attention that cannot be trained on a device.

    Raises:
        UserError: It was asked for, and cannot.
    """
    if config.attention_backend == "flex" and not can_use_blocks(config, device):
        raise UserError(
            f"model.gpt.attention_backend is flex, but FlexAttention cannot train on {device.type} with heads of "
            f"{config.head_width} channels (it needs a GPU, and {NARROWEST}); choose auto, sdpa or manual"
        )


def layout(
    config: "GPTConfig", position: Position, input_ids: Tensor, document_ids: Tensor | None, cache: "KVCache | None"
) -> Layout:
    """Work it out.

    Args:
        config: The architecture.
        position: The scheme.
        input_ids: (B, T) int64.
        document_ids: (B, T) int64, another number for each document of a row; its tokens stand side by side.
        cache: What came before, if anything did; it is ready for the tokens.
    """
    T, device = input_ids.size(1), input_ids.device
    place = torch.arange(T, device=device)
    if cache is not None:
        positions, needs_mask, S = cache.places, cache.masked, cache.stop
    else:
        positions = place if document_ids is None else in_documents(document_ids, place)
        needs_mask, S = document_ids is not None, T
    rotation = position.rotation(positions)
    window = config.sliding_window if config.sliding_window is not None and config.sliding_window < S else None
    blocks = config.attention_backend == "flex" or (
        config.attention_backend == "auto"
        and can_use_blocks(config, device)
        and (needs_mask or window is not None or config.attention_softcap is not None or position.biased)
    )
    if blocks and cache is None:
        return Layout(positions, rotation, _blocks(input_ids, document_ids, window))
    if not (needs_mask or window is not None or position.biased):
        return Layout(positions, rotation, None)
    query = positions if cache is not None else place  # (T,) or (B, T)
    distance = query[..., None] - torch.arange(S, device=device)  # (T, S) or (B, T, S)
    distance = distance.view(-1, 1, T, S)  # (1 or B, 1, T, S)
    visible = distance >= 0
    if document_ids is not None:
        visible = visible & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if window is not None:
        visible = visible & (distance < window)
    if not position.biased:
        return Layout(positions, rotation, visible)
    heads = torch.arange(config.n_head, device=device).view(1, -1, 1, 1)
    bias = position.bias(heads, distance)  # (1 or B, n_head, T, S)
    return Layout(positions, rotation, bias.masked_fill(~visible, float("-inf")))


def in_documents(document_ids: Tensor, place: Tensor) -> Tensor:
    """How far each token stands from the first of its document: (B, T)."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return place - torch.where(begins, place, 0).cummax(dim=1).values


def _blocks(input_ids: Tensor, document_ids: Tensor | None, window: int | None) -> BlockMask:
    B, T = input_ids.shape

    def visible(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if document_ids is not None:
            seen = seen & (document_ids[b, query] == document_ids[b, key])
        return seen

    rows = None if document_ids is None else B
    return create_block_mask(visible, rows, None, T, T, device=input_ids.device, _compile=input_ids.is_cuda)
