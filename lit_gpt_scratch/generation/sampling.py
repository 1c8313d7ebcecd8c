"""Sample the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError

MAX_UNIFORM = 1 - 2**-22
"""Factor that keeps uniform random numbers below 1, because numbers close to 1 are rounded to 1 in float32."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, which are applied in the order in which they are listed.

    Args:
        repetition_penalty: Factor for the logits of tokens that already occur in the prompt or the generated text:
            positive logits are divided by this factor, and negative logits are multiplied by it (CTRL,
            https://arxiv.org/abs/1909.05858). 1 has no effect.
        temperature: Divisor of the logits. Values below 1 sharpen the distribution, values above 1 flatten it, and 0
            selects greedy decoding.
        top_k: Number of most probable tokens to keep; None keeps all tokens.
        top_p: Cumulative probability for nucleus sampling (https://arxiv.org/abs/1904.09751): the smallest set of most
            probable tokens whose total probability reaches ``top_p`` is kept. None keeps all tokens.
        min_p: Minimum probability of the tokens to keep, as a fraction of the highest probability
            (https://arxiv.org/abs/2407.01082). None keeps all tokens.

    Raises:
        UserError: A value is out of range.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be positive and finite")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be finite and 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} is {value}; it must be above 0 and at most 1")

    def sample(self, logits: Tensor, uniform: list[float], seen: Tensor | None = None) -> Tensor:
        """Sample one token per row.

        Args:
            logits: Logits, float tensor of shape (B, vocab_size).
            uniform: B uniform random numbers in [0, 1), one per row. They are the only source of randomness.
            seen: Mask of the tokens that occur in each row, bool tensor of shape (B, vocab_size); used only for the
                repetition penalty.

        Returns:
            Token ids, int64 tensor of shape (B,).

        Raises:
            UserError: The largest logit of a row is NaN or infinite, because training has diverged.
        """
        if self.repetition_penalty != 1 and seen is not None:
            penalized = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalized, logits)
        top, argmax = logits.max(-1, keepdim=True)  # (B, 1)
        if not top.isfinite().all():
            raise UserError(
                "the model's logits are NaN or infinite, because training diverged; use an earlier checkpoint"
            )
        if self.temperature == 0:
            return argmax.squeeze(-1)
        # Subtract the maximum first, so that a very small temperature does not cause overflow.
        logits, ids = (logits - top) / self.temperature, None
        if self.top_k is not None or self.top_p is not None:
            logits, ids = logits.topk(
                min(self.top_k or logits.size(-1), logits.size(-1))
            )  # (B, k), in descending order
        probabilities = logits.softmax(-1)  # (B, k)
        if self.top_p is not None:
            probabilities = probabilities.masked_fill(probabilities.cumsum(-1) - probabilities >= self.top_p, 0.0)
        if self.min_p is not None:
            threshold = self.min_p * probabilities.amax(-1, keepdim=True)  # (B, 1)
            probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
        cumulative = probabilities.cumsum(-1)  # (B, k)
        drawn = torch.tensor(uniform, device=logits.device)[:, None] * MAX_UNIFORM * cumulative[:, -1:]  # (B, 1)
        index = torch.searchsorted(cumulative, drawn, right=True)  # (B, 1), first index with cumulative > drawn
        return (index if ids is None else ids.gather(-1, index)).squeeze(-1)
