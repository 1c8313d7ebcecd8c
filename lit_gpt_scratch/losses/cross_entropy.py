"""How surprised a model is by the tokens that really came."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_gpt_scratch.batch_types import IGNORE_INDEX


def token_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of the labels, and how many there were.

    Args:
        logits: (B, T, vocab_size) float; what has fewer bits than float32 is summed in float32.
        labels: (B, T) int64; positions of ``IGNORE_INDEX`` (-100) count for nothing.

    Returns:
        The sum in nats (scalar, at least float32) and the number of counted labels (int64 scalar). Their ratio is
        the mean loss; kept apart they add up right over batches of different size.
    """
    flat, target = logits.flatten(0, 1), labels.flatten()  # (B * T, vocab_size), (B * T,)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    nats = F.cross_entropy(flat, target, ignore_index=IGNORE_INDEX, reduction="sum")
    return nats, (target != IGNORE_INDEX).sum()


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label.

    Args:
        logits: (B, T, vocab_size) float; what has fewer bits than float32 is computed in float32.
        labels: (B, T) int64.

    Returns:
        (B, T) nats, at least float32; 0 where the label is ``IGNORE_INDEX`` (-100).
    """
    flat, target = logits.flatten(0, 1), labels.flatten()  # (B * T, vocab_size), (B * T,)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return -F.cross_entropy(flat, target, ignore_index=IGNORE_INDEX, reduction="none").view(labels.shape)


def sequence_logprobs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the labels of each row together, as preferences and choices are compared by it.

    Args:
        logits: (B, T, vocab_size), as for ``token_logprobs``.
        labels: (B, T) int64; of a prompt, and behind the end of a row, ``IGNORE_INDEX`` (-100).

    Returns:
        Sums in nats, (B,), and how many labels each has, (B,) int64: their ratio is the mean a token. A row without
        labels has 0 of both.
    """
    return token_logprobs(logits, labels).sum(-1), (labels != IGNORE_INDEX).sum(-1)
