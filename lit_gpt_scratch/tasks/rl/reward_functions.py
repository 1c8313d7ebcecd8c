"""Rewards of replies: a reward model, or a function of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import TextRewardFunction
from lit_gpt_scratch.checkpoint.loading import load_reward_model
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.tasks.rl.rollouts import Replies


class RewardFunction(Protocol):
    """Scores replies."""

    def __call__(self, replies: Replies) -> Tensor:
        """(N,) float32, on the CPU."""


def is_checkpoint_path(name: str | None) -> bool:
    """Whether a reward names a trained model rather than a function: it has a slash, or is an existing path."""
    return name is not None and ("/" in name or Path(name).exists())


class RewardModelScorer:
    """A trained reward model, applied to prompt and reply and read at their last token.

    Args:
        place: Its run folder or checkpoint.
        tokenizer_json: The policy's tokenizer.
        max_length: The most tokens of a text.
        batch_size: Texts per forward pass.
        trusted: The custom attention class that the checkpoint may name: building it runs that code.

    Raises:
        UserError: There is none, it is no reward model, it was trained with another tokenizer, its context is too
            short, or it names a class that is not trusted.
    """

    def __init__(self, place: str, tokenizer_json: str, max_length: int, batch_size: int, trusted: str | None) -> None:
        try:
            self.net = load_reward_model(place, tokenizer_json, trusted)
        except UserError as error:
            raise UserError(f"model.reward: {str(error).replace('--trust ', '--model.gpt.attention ')}") from error
        if self.net.block_size < max_length:
            raise UserError(
                f"model.reward: the reward model {place} has a context of {self.net.block_size} tokens, but "
                f"data.block_size is {max_length}: lower that, or train the reward model with --data.block_size "
                f"{max_length}"
            )
        self.place = place
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, replies: Replies) -> Tensor:
        """(N,) float32, on the CPU.

        Raises:
            UserError: A reward is not finite.
        """
        texts, scores = replies.full_ids, []
        device = self.net.embedding.weight.device
        for first in range(0, len(texts), self.batch_size):
            part = texts[first : first + self.batch_size]
            lengths = torch.tensor([len(text) for text in part], device=device)
            padded = [text + [0] * (int(lengths.max()) - len(text)) for text in part]  # no token attends to padding
            scores.append(self.net.forward_pooled(torch.tensor(padded, device=device), lengths).float().cpu())
        return _require_finite(torch.cat(scores), self.place, replies.texts)


class TextFunctionScorer:
    """A reward function of texts.

    Args:
        name: For error messages.
        function: (prompts, one reply for each) -> one number for each.
    """

    def __init__(self, name: str, function: TextRewardFunction) -> None:
        self.name = name
        self.function = function

    def __call__(self, replies: Replies) -> Tensor:
        """(N,) float32, on the CPU.

        Raises:
            UserError: The function doesn't return one finite number for each reply.
        """
        returned = self.function(replies.prompt_texts, replies.texts)
        try:
            scores = torch.as_tensor(returned, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"model.reward: {self.name} gave {type(returned).__name__}, no numbers") from error
        if scores.shape != (len(replies.texts),):
            raise UserError(
                f"model.reward: {self.name} gave a shape of {tuple(scores.shape)} for {len(replies.texts)} replies; it "
                "must give one number for each"
            )
        return _require_finite(scores, self.name, replies.texts)


def _require_finite(scores: Tensor, name: str, replies: Sequence[str]) -> Tensor:
    """A reward that is NaN or infinite would turn every weight into NaN."""
    for score, reply in zip(scores.tolist(), replies, strict=True):
        if not abs(score) < float("inf"):
            raise UserError(f"model.reward: {name} gave {score} for the reply {reply[:60]!r}; it must be finite")
    return scores
