"""Sample the next token from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError

MAX_UNIFORM = 1 - 2**-22
"""Factor for uniform random numbers, so that the product with the total probability never rounds up to that total."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters, applied in this order.

    Args:
        repetition_penalty: Factor that divides the positive logits of tokens that already occur, and multiplies their
            negative logits (CTRL, https://arxiv.org/abs/1909.05858). 1 disables it.
        temperature: Divisor of the logits. Values below 1 sharpen the distribution, values above 1 flatten it, and 0
            selects greedy decoding.
        top_k: Number of most probable tokens to keep; None keeps all.
        top_p: Total probability to keep: only the smallest set of most probable tokens that reaches it is kept (nucleus
            sampling, https://arxiv.org/abs/1904.09751). None keeps all.
        min_p: Minimum probability of a token to be kept, as a fraction of the highest probability
            (https://arxiv.org/abs/2407.01082). None keeps all.

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
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be positive")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name} is {value}; it must be above 0 and at most 1")

    def sample(self, logits: Tensor, uniform: list[float], seen: Tensor | None = None) -> Tensor:
        """Sample one token per row.

        Args:
            logits: (B, vocab_size) float.
            uniform: B random numbers in [0, 1), the only source of randomness.
            seen: (B, vocab_size) bool mask of the tokens that occur in each row, used only by the repetition penalty.

        Returns:
            Token ids, (B,) int64.

        Raises:
            UserError: A logit is NaN or infinite, or all are minus infinity, because the model has diverged.
        """
        if self.repetition_penalty != 1 and seen is not None:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        top, argmax = logits.max(-1, keepdim=True)  # (B, 1)
        if not top.isfinite().all():
            raise UserError("the model's logits are NaN or infinite: training diverged; use an earlier checkpoint")
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
        index = torch.searchsorted(cumulative, drawn, right=True)  # (B, 1), the first that exceeds the drawn number
        return (index if ids is None else ids.gather(-1, index)).squeeze(-1)
