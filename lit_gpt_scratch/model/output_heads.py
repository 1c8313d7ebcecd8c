"""Output heads: next-token logits, class logits, or a scalar per position. The weight itself is ``GPT.head``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from lit_gpt_scratch.model.config import GPTConfig


class OutputHead(Protocol):
    """The size of the output projection ``GPT.head``, and the postprocessing of its output."""

    def out_features(self, config: GPTConfig, vocab_size: int) -> int:
        """Output features of the projection."""

    def finalize(self, x: Tensor, config: GPTConfig, vocab_size: int) -> Tensor:
        """x: (B, T, out_features) output of the projection in at least float32 -> the model's output."""


def padded_vocab_size(config: GPTConfig, vocab_size: int) -> int:
    """Rows of embedding and head: the vocabulary size, rounded up to ``config.vocab_multiple``."""
    return -(-vocab_size // config.vocab_multiple) * config.vocab_multiple


@dataclass(frozen=True)
class TokenHead:
    """Next-token logits: (B, T, vocab_size)."""

    def out_features(self, config: GPTConfig, vocab_size: int) -> int:
        """As many as the embedding has rows."""
        return padded_vocab_size(config, vocab_size)

    def finalize(self, x: Tensor, config: GPTConfig, vocab_size: int) -> Tensor:
        """Drop the padding rows of the vocabulary, and apply ``config.logit_softcap``."""
        logits = x[..., :vocab_size]
        cap = config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(frozen=True)
class ClassificationHead:
    """Class logits at each position: (B, T, n_classes).

    Attributes:
        n_classes: Number of classes.
        class_names: Their names, if known: weights that were trained for one class are of no use for another.
    """

    n_classes: int
    class_names: tuple[str, ...] = ()

    def out_features(self, config: GPTConfig, vocab_size: int) -> int:
        """One per class."""
        return self.n_classes

    def finalize(self, x: Tensor, config: GPTConfig, vocab_size: int) -> Tensor:
        """Unchanged."""
        return x


@dataclass(frozen=True)
class ScalarHead:
    """One number at each position, such as a reward or value: (B, T)."""

    def out_features(self, config: GPTConfig, vocab_size: int) -> int:
        """One."""
        return 1

    def finalize(self, x: Tensor, config: GPTConfig, vocab_size: int) -> Tensor:
        """Remove the last dimension."""
        return x.squeeze(-1)


def pool_last(x: Tensor, lengths: Tensor) -> Tensor:
    """Hidden state of each text's last token, which attends to all of it: (B, T, n_embd), (B,) -> (B, 1, n_embd)."""
    return x[torch.arange(len(x), device=x.device), lengths.clamp(min=1) - 1].unsqueeze(1)


def pool_mean(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean hidden state of each text: (B, T, n_embd), (B,) -> (B, 1, n_embd)."""
    in_text = torch.arange(x.size(1), device=x.device) < lengths[:, None]  # (B, T)
    return (x * in_text[..., None]).sum(1, keepdim=True) / lengths.clamp(min=1)[:, None, None]


POOLINGS: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"last": pool_last, "mean": pool_mean}
"""Ways to pool a text's hidden states into one vector; ``lengths`` excludes padding."""
