"""Token-level cross-entropy and log-probabilities."""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gpt_scratch.batch_types import IGNORE_INDEX

MAX_LOGITS_MB_CPU: Final = 64
MAX_LOGITS_MB_ACCELERATOR: Final = 1024


def token_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the summed cross-entropy loss and the number of labels.

    Args:
        logits: Logits, float tensor of shape (B, T, vocab_size); lower-precision dtypes are converted to float32.
        labels: Labels, int64 tensor of shape (B, T); positions with ``IGNORE_INDEX`` (-100) are ignored.

    Returns:
        The summed loss in nats (scalar, at least float32) and the number of labels that are not ignored (int64 scalar).
        Their ratio is the mean loss. They are returned separately, so that they can be summed over batches of different
        sizes.
    """
    flat, target = logits.flatten(0, 1), labels.flatten()  # (B * T, vocab_size), (B * T,)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    nats = F.cross_entropy(flat, target, ignore_index=IGNORE_INDEX, reduction="sum")
    return nats, (target != IGNORE_INDEX).sum()


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the log-probability of each label.

    Args:
        logits: Logits, float tensor of shape (B, T, vocab_size); lower-precision dtypes are converted to float32.
        labels: Labels, int64 tensor of shape (B, T).

    Returns:
        Log-probabilities in nats, in at least float32, of shape (B, T); 0 where the label is ``IGNORE_INDEX`` (-100).
    """
    flat, target = logits.flatten(0, 1), labels.flatten()  # (B * T, vocab_size), (B * T,)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return -F.cross_entropy(flat, target, ignore_index=IGNORE_INDEX, reduction="none").view(labels.shape)


def sequence_logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the total log-probability of the labels in each row, for preference losses and multiple choice.

    Args:
        logits: Logits of shape (B, T, vocab_size); see ``token_logprobs``.
        labels: Labels, int64 tensor of shape (B, T); ``IGNORE_INDEX`` (-100) at prompt and padding positions.

    Returns:
        The summed log-probabilities in nats, of shape (B,), and the number of labels in each row, int64 tensor of shape
        (B,). Their ratio is the mean log-probability per token. Both are 0 for a row without labels.
    """
    return token_logprobs(logits, labels).sum(-1), (labels != IGNORE_INDEX).sum(-1)


def default_max_logits_mb(device: torch.device) -> int:
    """Return the default of the maximum size of the float32 logits that are in memory at once, in MB.

    Each chunk reads and writes the gradient of the head once. Relative to the matmuls, this takes a time proportional
    to FLOP/s / (bandwidth * positions per chunk), so accelerators need larger chunks than CPUs.
    """
    return MAX_LOGITS_MB_CPU if device.type == "cpu" else MAX_LOGITS_MB_ACCELERATOR


def positions_per_chunk(vocab_size: int, max_logits_mb: float) -> int:
    """Return the largest power of two of positions whose float32 logits take at most ``max_logits_mb`` MB, at least 1.

    A power of two suits matmuls on GPUs, and typical micro-batches have a multiple of it.
    """
    fitting = max(1, int(max_logits_mb * 10**6 / (4 * vocab_size)))
    return 1 << (fitting.bit_length() - 1)
