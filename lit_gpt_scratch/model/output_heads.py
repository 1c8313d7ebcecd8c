"""Output heads: next-token logits, class logits, or one scalar per position. The weight itself is ``GPT.head``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from lit_gpt_scratch.model.config import GPTConfig


class OutputHead(Protocol):
    """Defines the size of the output projection ``GPT.head`` and the postprocessing of its output."""

    def out_features(self, config: GPTConfig, vocab_size: int) -> int:
        """Return the number of output features of the projection."""

    def finalize(self, x: Tensor, config: GPTConfig, vocab_size: int) -> Tensor:
        """Convert the projection's output, (B, T, out_features) in at least float32, to the model's output."""


def padded_vocab_size(config: GPTConfig, vocab_size: int) -> int:
    """Return the number of embedding and head rows: ``vocab_size`` rounded up to ``config.vocab_multiple``."""
    return -(-vocab_size // config.vocab_multiple) * config.vocab_multiple


@dataclass(frozen=True)
class TokenHead:
    """Next-token logits: (B, T, vocab_size)."""

    def out_features(self, config: GPTConfig, vocab_size: int) -> int:
        """Return the number of rows in the embedding."""
        return padded_vocab_size(config, vocab_size)

    def finalize(self, x: Tensor, config: GPTConfig, vocab_size: int) -> Tensor:
        """Drop the logits of the vocabulary's padding rows and apply ``config.logit_softcap``."""
        logits = x[..., :vocab_size]
        cap = config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(frozen=True)
class ClassificationHead:
    """Class logits at each position: (B, T, n_classes).

    Attributes:
        n_classes: Number of classes.
        class_names: Names of the classes, if known. Trained weights are only meaningful for the same classes.
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
    """One scalar at each position, such as a reward or value: (B, T)."""

    def out_features(self, config: GPTConfig, vocab_size: int) -> int:
        """Return 1."""
        return 1

    def finalize(self, x: Tensor, config: GPTConfig, vocab_size: int) -> Tensor:
        """Remove the last dimension."""
        return x.squeeze(-1)


def pool_last(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the hidden state at the last token of each text: (B, T, n_embd), (B,) -> (B, 1, n_embd).

    Only the last token attends to the whole text.
    """
    return x[torch.arange(len(x), device=x.device), lengths.clamp(min=1) - 1].unsqueeze(1)


def pool_mean(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean hidden state of each text: (B, T, n_embd), (B,) -> (B, 1, n_embd)."""
    in_text = torch.arange(x.size(1), device=x.device) < lengths[:, None]  # (B, T)
    return (x * in_text[..., None]).sum(1, keepdim=True) / lengths.clamp(min=1)[:, None, None]


POOLINGS: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"last": pool_last, "mean": pool_mean}
"""Functions that pool the hidden states of each text into one vector, by name; ``lengths`` excludes padding."""
