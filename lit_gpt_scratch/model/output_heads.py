"""What is read off the stream after the last block: tokens, classes, or a number. The matrix itself is ``GPT.head``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lit_gpt_scratch.model.config import GPTConfig
    from lit_gpt_scratch.model.gpt import GPT


class OutputHead(Protocol):
    """A linear map from the stream, and how its outputs are read."""

    def out_features(self, config: "GPTConfig", vocab_size: int) -> int:
        """Rows of the matrix."""

    def finalize(self, x: Tensor, config: "GPTConfig", vocab_size: int) -> Tensor:
        """x: (B, T, width), what the matrix gives, in at least float32 -> what the model gives."""


def padded_vocab_size(config: "GPTConfig", vocab_size: int) -> int:
    """Rows of embedding and head: the vocabulary's, rounded up."""
    return -(-vocab_size // config.vocab_multiple) * config.vocab_multiple


@dataclass(frozen=True)
class TokenHead:
    """Logits of the next token: (B, T, vocab_size)."""

    def out_features(self, config: "GPTConfig", vocab_size: int) -> int:
        """As many as the embedding has."""
        return padded_vocab_size(config, vocab_size)

    def finalize(self, x: Tensor, config: "GPTConfig", vocab_size: int) -> Tensor:
        """Without the rows beyond the vocabulary, and squashed if the config says so."""
        logits = x[..., :vocab_size]
        cap = config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(frozen=True)
class ClassificationHead:
    """Logits of classes, at every token: (B, T, n).

    Attributes:
        n: How many classes there are.
        names: Of each, where they are known: a row that was learned for one class means nothing of another.
    """

    n: int
    names: tuple[str, ...] = ()

    def out_features(self, config: "GPTConfig", vocab_size: int) -> int:
        """One row a class."""
        return self.n

    def finalize(self, x: Tensor, config: "GPTConfig", vocab_size: int) -> Tensor:
        """As they are."""
        return x


@dataclass(frozen=True)
class ScalarHead:
    """One number at every token, as a reward or a value: (B, T)."""

    def out_features(self, config: "GPTConfig", vocab_size: int) -> int:
        """One row."""
        return 1

    def finalize(self, x: Tensor, config: "GPTConfig", vocab_size: int) -> Tensor:
        """Without the dimension that it comes in."""
        return x.squeeze(-1)


def pool_last(x: Tensor, lengths: Tensor) -> Tensor:
    """The stream at the last token of each text, which has seen all of it: (B, T, n_embd), (B,) -> (B, 1, n_embd)."""
    return x[torch.arange(len(x), device=x.device), lengths.clamp(min=1) - 1].unsqueeze(1)


def pool_mean(x: Tensor, lengths: Tensor) -> Tensor:
    """The mean of the stream over each text: (B, T, n_embd), (B,) -> (B, 1, n_embd)."""
    within = torch.arange(x.size(1), device=x.device) < lengths[:, None]  # (B, T)
    return (x * within[..., None]).sum(1, keepdim=True) / lengths.clamp(min=1)[:, None, None]


POOLINGS: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {"last": pool_last, "mean": pool_mean}
"""How a text's stream becomes one vector; ``lengths`` are its tokens, and the others fill the window up."""


def compute_rewards(net: "GPT", input_ids: Tensor, lengths: Tensor) -> Tensor:
    """What a ``ScalarHead`` head reads at the last token of each text.

    Args:
        net: With such a head.
        input_ids: (B, T) int64, filled up behind each text.
        lengths: (B,) int64, tokens of each text.

    Returns:
        (B,), at least float32.
    """
    read: Tensor = net.apply_head(pool_last(net.hidden_states(input_ids), lengths))  # (B, 1)
    return read.squeeze(1)
