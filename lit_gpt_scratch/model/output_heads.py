"""Output heads for next-token logits, class logits or one scalar per position; their weights are in ``GPT.head``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from lit_gpt_scratch.model.config import GPTConfig


class OutputHead(Protocol):
    """Protocol for output heads, which define the size of the projection ``GPT.head`` and postprocess its output."""

    def out_features(self, config: GPTConfig, vocab_size: int) -> int:
        """Return the number of output features of ``GPT.head``."""

    def finalize(self, x: Tensor, config: GPTConfig, vocab_size: int) -> Tensor:
        """Convert the output of ``GPT.head`` to the output of the model.

        Args:
            x: Output of ``GPT.head``, of shape (B, T, out_features), in float32 or higher precision.
            config: The architecture.
            vocab_size: Number of tokens in the vocabulary, before padding.
        """


def padded_vocab_size(config: GPTConfig, vocab_size: int) -> int:
    """Return ``vocab_size``, rounded up to a multiple of ``config.vocab_multiple``."""
    return -(-vocab_size // config.vocab_multiple) * config.vocab_multiple


@dataclass(frozen=True)
class TokenHead:
    """Output head for next-token logits, of shape (B, T, vocab_size)."""

    def out_features(self, config: GPTConfig, vocab_size: int) -> int:
        """Return the vocabulary size, rounded up to a multiple of ``config.vocab_multiple``."""
        return padded_vocab_size(config, vocab_size)

    def finalize(self, x: Tensor, config: GPTConfig, vocab_size: int) -> Tensor:
        """Truncate the logits from the padded to the actual vocabulary size, scale them and apply the soft cap."""
        logits = x if x.size(-1) == vocab_size else x[..., :vocab_size]  # the gradient of a slice is a copy
        if config.logit_multiplier != 1:
            logits = logits * config.logit_multiplier
        cap = config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(frozen=True)
class ClassificationHead:
    """Output head for class logits at each position, of shape (B, T, n_classes).

    Attributes:
        n_classes: Number of classes.
        class_names: Class names in the order of the logits, or an empty tuple if unknown.
    """

    n_classes: int
    class_names: tuple[str, ...] = ()

    def out_features(self, config: GPTConfig, vocab_size: int) -> int:
        """Return the number of classes."""
        return self.n_classes

    def finalize(self, x: Tensor, config: GPTConfig, vocab_size: int) -> Tensor:
        """Return the logits unchanged."""
        return x


@dataclass(frozen=True)
class ScalarHead:
    """Output head for one scalar at each position, such as a reward or value; the output has shape (B, T)."""

    def out_features(self, config: GPTConfig, vocab_size: int) -> int:
        """Return 1, the number of scalars per position."""
        return 1

    def finalize(self, x: Tensor, config: GPTConfig, vocab_size: int) -> Tensor:
        """Remove the last dimension, which has size 1."""
        return x.squeeze(-1)


def pool_last(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the hidden state of the last token of each sequence: (B, T, n_embd), (B,) -> (B, 1, n_embd).

    Because of the causal mask, only the last token attends to the entire sequence.
    """
    return x[torch.arange(len(x), device=x.device), lengths.clamp(min=1) - 1].unsqueeze(1)


def pool_mean(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean hidden state of each sequence: (B, T, n_embd), (B,) -> (B, 1, n_embd)."""
    in_text = torch.arange(x.size(1), device=x.device) < lengths[:, None]  # (B, T)
    return (x * in_text[..., None]).sum(1, keepdim=True) / lengths.clamp(min=1)[:, None, None]


def pool_windows(pooled: Tensor, lengths: Tensor, window_counts: Tensor) -> Tensor:
    """Average the windows of each sequence, weighted by their lengths: (W, 1, n_embd), (W,), (B,) -> (B, 1, n_embd).

    With ``pool_mean``, the result is the mean over all tokens of the sequence.
    """
    sequence = torch.repeat_interleave(window_counts, output_size=len(pooled))  # (W,), index of the sequence
    is_part = sequence == torch.arange(len(window_counts), device=pooled.device)[:, None]  # (B, W)
    weights = is_part * lengths.clamp(min=1)
    shares = (weights / weights.sum(1, keepdim=True)).to(pooled.dtype)
    return (shares[..., None] * pooled.squeeze(1)).sum(1, keepdim=True)  # not a matmul, which autocast would round


POOLINGS: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"last": pool_last, "mean": pool_mean}
"""Functions that pool the hidden states of each sequence into one vector, keyed by name.

The arguments are the hidden states and the length of each sequence, excluding padding.
"""
