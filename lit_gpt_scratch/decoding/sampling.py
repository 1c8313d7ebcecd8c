"""Logits to the next token, and the loop that writes text."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT


@dataclass(frozen=True)
class Sampling:
    """How to choose among the next tokens.

    Args:
        temperature: Below 1 sharpens the distribution, above 1 flattens it; 0 always takes the likeliest.
        top_k: Choose among the k likeliest only; None chooses among all.

    Raises:
        UserError: A number is out of its range.
    """

    temperature: float = 0.8
    top_k: int | None = 50

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1")

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """One token a row: (B, vocab_size) float -> (B,) int64.

        Raises:
            UserError: A logit is NaN: the model has diverged.
        """
        if logits.isnan().any():
            raise UserError("the model's predictions are not numbers: it diverged in training")
        if self.temperature == 0:
            return logits.argmax(-1)
        # The largest becomes 0 first, so that the smallest temperature overflows nothing.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.size(-1):
            kth = logits.topk(self.top_k).values[..., -1:]  # (B, 1)
            logits = logits.masked_fill(logits < kth, float("-inf"))
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def generate(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    end_of_text: int,
) -> Iterator[int]:
    """Continue a prompt, one token after the other, until the document ends.

    When text outgrows the context, the model sees the last ``block_size`` tokens of it.

    Args:
        model: In evaluation mode.
        prompt: Ids to continue; at least one, so begin with the end of text of the "last" document.
        max_new_tokens: Stop after so many.
        sampling: How to choose.
        seed: Of the choices; the global random state is left alone.
        end_of_text: Stop when this token is chosen; it is not returned.

    Raises:
        UserError: The prompt is longer than the context, or ``max_new_tokens`` is negative.
    """
    if len(prompt) > model.block_size:
        raise UserError(
            f"the prompt has {len(prompt)} tokens (with the start of text), the context holds {model.block_size}; "
            f"shorten the prompt"
        )
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    return _continue(model, prompt, max_new_tokens, sampling, seed, end_of_text)


@torch.no_grad()
def _continue(
    model: GPT, prompt: list[int], max_new_tokens: int, sampling: Sampling, seed: int, end_of_text: int
) -> Iterator[int]:
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    ids = torch.tensor([prompt], device=device)  # (1, T)
    for _ in range(max_new_tokens):
        # Windows of ever new lengths would be compiled anew each.
        with torch.compiler.set_stance("force_eager"):
            logits = model(ids[:, -model.block_size :])[:, -1]  # (1, vocab_size)
        token = sampling.choose(logits, generator)  # (1,)
        if token.item() == end_of_text:
            return
        yield int(token.item())
        ids = torch.cat((ids, token[:, None]), dim=1)
