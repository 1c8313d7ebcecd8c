"""Dequantize weights in MXFP4, the format of published gpt-oss models.

A block of 32 numbers of 4 bits shares a scale, a power of two
(https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
"""

from typing import Final

import torch
from torch import Tensor

from lit_gpt_scratch.interop.tensor_stream import LazyTensors

BLOCKS, SCALES = "_blocks", "_scales"
"""Suffixes of the two tensors that store a weight."""
BLOCK_BYTES: Final = 16
VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 codes."""
EXPONENT_BIAS: Final = 127


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the matrices of experts that are stored in MXFP4, in bfloat16, which can represent their values exactly.

    Args:
        blocks: Codes of two numbers per byte, the first in the lower four bits, uint8 tensor of shape
            (n_experts, out_features, in_features / 32, 16).
        scales: Exponents of the scales, increased by 127, uint8 tensor of shape
            (n_experts, out_features, in_features / 32).

    Returns:
        The matrices, bfloat16 tensor of shape (n_experts, in_features, out_features).
    """
    values = torch.tensor(VALUES, dtype=torch.bfloat16, device=blocks.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # (256, 2)
    exponents = scales.int()[..., None] - EXPONENT_BIAS
    return torch.stack(
        [
            torch.ldexp(pairs[block.int()].flatten(-2), exponent).flatten(-2).T  # (in_features, out_features)
            for block, exponent in zip(blocks, exponents, strict=True)
        ]
    )


def dequantize_stored(tensors: LazyTensors) -> LazyTensors:
    """Return the tensors of a model, with a weight in place of the blocks and scales of each weight in MXFP4."""
    shapes, stored = dict(tensors.on_meta), dict[str, tuple[str, str]]()
    for name, blocks in tensors.on_meta.items():
        weight = name.removesuffix(BLOCKS)
        scales = tensors.on_meta.get(weight + SCALES)
        if weight == name or scales is None or not _is_mxfp4(blocks, scales):
            continue
        del shapes[name], shapes[weight + SCALES]
        experts, out_features, n_blocks, _ = blocks.shape
        shape = experts, n_blocks * BLOCK_BYTES * 2, out_features
        shapes[weight] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        stored[weight] = name, weight + SCALES

    def read(name: str) -> Tensor:
        return dequantize_mxfp4(*(tensors[part] for part in stored[name])) if name in stored else tensors[name]

    return LazyTensors(shapes, read)


def _is_mxfp4(blocks: Tensor, scales: Tensor) -> bool:
    is_packed = blocks.dtype == scales.dtype == torch.uint8 and blocks.shape[:-1] == scales.shape
    return is_packed and blocks.ndim == 4 and blocks.size(-1) == BLOCK_BYTES
