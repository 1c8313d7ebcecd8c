"""Activation checkpointing: recompute activations in the backward pass instead of storing them.

Full activation checkpointing (https://arxiv.org/abs/1604.06174) stores only the input of each block. Selective
activation checkpointing (https://arxiv.org/abs/2205.05198) also stores the outputs of some operators.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal, TypeAlias, TypeVar

import torch
from torch.nn.attention import flex_attention  # noqa: F401 - it defines an operator
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.kernels import cpu_attention, grouped_linear, onednn_linear  # noqa: F401 - they define operators
from lit_gpt_scratch.model.config import GPTConfig

Outputs = TypeVar("Outputs")
ActivationCheckpointing: TypeAlias = bool | Literal["keep_attention", "keep_matmuls"]
"""What a block stores for the backward pass: all activations (False), only its input (True), or also the outputs of
the operators in ``KEPT_OPERATORS``."""

ATTENTION: Final = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.lit_gpt_scratch.causal_attention.default,
)
MATMULS: Final = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.lit_gpt_scratch.product.default,
    torch.ops.lit_gpt_scratch.grouped_product.default,
)
KEPT_OPERATORS: Final = {"keep_attention": ATTENTION, "keep_matmuls": ATTENTION + MATMULS}
"""Operators whose outputs selective activation checkpointing stores: fused attention, or all matmuls."""


def validate_checkpointing(checkpointing: ActivationCheckpointing, config: GPTConfig) -> None:
    """Check that selective activation checkpointing is possible and useful.

    Raises:
        UserError: The model has dropout or no fused attention.
    """
    if isinstance(checkpointing, str) and config.dropout:
        # The random state is restored at the start of a block, and operators that are not recomputed do not advance it.
        raise UserError(
            f"model.activation_checkpointing is {checkpointing}, but model.gpt.dropout is {config.dropout}, and "
            "recomputed dropout would drop other elements; set dropout to 0, or activation_checkpointing to true"
        )
    if checkpointing == "keep_attention" and config.attention_backend == "manual":
        raise UserError(
            "model.activation_checkpointing is keep_attention, but model.gpt.attention_backend is manual, which has no "
            "fused attention to keep; use keep_matmuls or true"
        )


def call_with_checkpointing(
    checkpointing: ActivationCheckpointing, function: Callable[..., Outputs], *inputs: Any
) -> Outputs:
    """Return ``function(*inputs)``, storing for the backward pass only what ``checkpointing`` specifies."""
    selective: dict[str, Any] = {}
    if isinstance(checkpointing, str):
        kept = list(KEPT_OPERATORS[checkpointing])
        selective["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    out: Outputs = checkpoint(function, *inputs, use_reentrant=False, **selective)
    return out
