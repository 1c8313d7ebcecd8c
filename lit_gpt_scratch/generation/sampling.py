"""Logits to the next token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError

MAX_UNIFORM = 1 - 2**-22
"""So that the largest uniform number, times a sum, is not rounded up to the sum."""


@dataclass(frozen=True)
class Sampling:
    """How to choose among the next tokens; what is set is applied in the order of the arguments.

    Args:
        repetition_penalty: Divide the logits of tokens that were there before by this, or multiply them where they are
            negative (CTRL, https://arxiv.org/abs/1909.05858); 1 leaves them alone.
        temperature: Below 1 sharpens the distribution, above 1 flattens it; 0 always takes the likeliest.
        top_k: Choose among the k likeliest only; None chooses among all.
        top_p: Choose among the likeliest that together have this probability, the one that reaches it included
            (nucleus sampling, https://arxiv.org/abs/1904.09751).
        min_p: Choose among those with at least this share of the likeliest one's probability
            (https://arxiv.org/abs/2407.01082).

    Raises:
        UserError: A number is out of its range.
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
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{name} is {share}; it must be above 0 and at most 1")

    def sample(self, logits: Tensor, uniform: list[float], seen: Tensor | None = None) -> Tensor:
        """One token a row.

        Args:
            logits: (B, vocab_size) float.
            uniform: A random number in [0, 1) for each row; it alone decides among what can be chosen.
            seen: (B, vocab_size) bool, which tokens a row has; only the repetition penalty reads it.

        Returns:
            (B,) int64.

        Raises:
            UserError: A logit is NaN or infinite, or all are minus infinity: the model has diverged.
        """
        if self.repetition_penalty != 1 and seen is not None:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        top, likeliest = logits.max(-1, keepdim=True)  # (B, 1)
        if not top.isfinite().all():
            raise UserError("the model's predictions are not numbers: it diverged in training")
        if self.temperature == 0:
            return likeliest.squeeze(-1)
        # The largest becomes 0 first, so that the smallest temperature overflows nothing.
        logits, ids = (logits - top) / self.temperature, None
        if self.top_k is not None or self.top_p is not None:
            logits, ids = logits.topk(min(self.top_k or logits.size(-1), logits.size(-1)))  # (B, k), the largest first
        chances = logits.softmax(-1)  # (B, k)
        if self.top_p is not None:
            chances = chances.masked_fill(chances.cumsum(-1) - chances >= self.top_p, 0.0)
        if self.min_p is not None:
            chances = chances.masked_fill(chances < self.min_p * chances.amax(-1, keepdim=True), 0.0)
        up_to = chances.cumsum(-1)
        drawn = torch.tensor(uniform, device=logits.device)[:, None] * MAX_UNIFORM * up_to[:, -1:]  # (B, 1)
        place = torch.searchsorted(up_to, drawn, right=True)  # (B, 1), the first that goes beyond
        return (place if ids is None else ids.gather(-1, place)).squeeze(-1)
