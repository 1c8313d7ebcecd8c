"""What is read off the stream after the last block: tokens, classes, or a number. The matrix itself is ``GPT.head``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig
    from lit_gpt_scratch.model.gpt import GPT


class Head(Protocol):
    """A linear map from the stream, and how its outputs are read."""

    def width(self, config: "GPTConfig", vocab_size: int) -> int:
        """Rows of the matrix."""

    def read(self, x: Tensor, config: "GPTConfig", vocab_size: int) -> Tensor:
        """x: (B, T, width), what the matrix gives, in at least float32 -> what the model gives."""


def padded(config: "GPTConfig", vocab_size: int) -> int:
    """Rows of embedding and head: the vocabulary's, rounded up."""
    return -(-vocab_size // config.vocab_multiple) * config.vocab_multiple


@dataclass(frozen=True)
class Tokens:
    """Logits of the next token: (B, T, vocab_size)."""

    def width(self, config: "GPTConfig", vocab_size: int) -> int:
        """As many as the embedding has."""
        return padded(config, vocab_size)

    def read(self, x: Tensor, config: "GPTConfig", vocab_size: int) -> Tensor:
        """Without the rows beyond the vocabulary, and squashed if the config says so."""
        logits = x[..., :vocab_size]
        cap = config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(frozen=True)
class Classes:
    """Logits of classes, at every token: (B, T, n).

    Attributes:
        n: How many classes there are.
        names: Of each, where they are known: a row that was learned for one class means nothing of another.
    """

    n: int
    names: tuple[str, ...] = ()

    def width(self, config: "GPTConfig", vocab_size: int) -> int:
        """One row a class."""
        return self.n

    def read(self, x: Tensor, config: "GPTConfig", vocab_size: int) -> Tensor:
        """As they are."""
        return x


@dataclass(frozen=True)
class Scalar:
    """One number at every token, as a reward or a value: (B, T)."""

    def width(self, config: "GPTConfig", vocab_size: int) -> int:
        """One row."""
        return 1

    def read(self, x: Tensor, config: "GPTConfig", vocab_size: int) -> Tensor:
        """Without the dimension that it comes in."""
        return x.squeeze(-1)


def last(x: Tensor, lengths: Tensor) -> Tensor:
    """The stream at the last token of each text, which has seen all of it: (B, T, n_embd), (B,) -> (B, 1, n_embd)."""
    return x[torch.arange(len(x), device=x.device), lengths.clamp(min=1) - 1].unsqueeze(1)


def mean(x: Tensor, lengths: Tensor) -> Tensor:
    """The mean of the stream over each text: (B, T, n_embd), (B,) -> (B, 1, n_embd)."""
    within = torch.arange(x.size(1), device=x.device) < lengths[:, None]  # (B, T)
    return (x * within[..., None]).sum(1, keepdim=True) / lengths.clamp(min=1)[:, None, None]


POOLINGS: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"last": last, "mean": mean}
"""How a text's stream becomes one vector; ``lengths`` are its tokens, and the others fill the window up."""


def rewards(net: "GPT", input_ids: Tensor, lengths: Tensor) -> Tensor:
    """What a ``Scalar`` head reads at the last token of each text.

    Args:
        net: With such a head.
        input_ids: (B, T) int64, filled up behind each text.
        lengths: (B,) int64, tokens of each text.

    Returns:
        (B,), at least float32.
    """
    read: Tensor = net.read(last(net.hidden(input_ids), lengths))  # (B, 1)
    return read.squeeze(1)
