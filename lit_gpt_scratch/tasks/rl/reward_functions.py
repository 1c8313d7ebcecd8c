"""Score replies with a reward model or with a function of their texts."""

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
    """Computes the rewards of replies."""

    def __call__(self, replies: Replies) -> Tensor:
        """Return the reward of each reply, (N,) float32 on the CPU."""


def is_checkpoint_path(name: str | None) -> bool:
    """Whether a reward is the path of a trained model rather than the name of a function.

    A reward is a path if it contains a slash, or if a file or folder of that name exists.
    """
    return name is not None and ("/" in name or Path(name).exists())


class RewardModelScorer:
    """Scores replies with a trained reward model, which reads the reward at the last token of prompt and reply.

    Args:
        place: Run folder or checkpoint of the reward model.
        tokenizer_json: Content of the policy's tokenizer file.
        max_length: Maximum tokens per text (prompt and reply).
        batch_size: Number of texts per forward pass.
        trusted: Import path of the only custom attention class that the checkpoint may name, because building the
            model runs the code of that class.

    Raises:
        UserError: The checkpoint does not exist, is not a reward model, was trained with another tokenizer, has too
            short a context, or names an attention class that is not trusted.
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
        """Return the reward of each reply, (N,) float32 on the CPU.

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
    """Scores replies with a function of their texts.

    Args:
        name: Name of the reward, for error messages.
        function: Function of the prompts and replies, one reply per prompt, that returns one number per reply.
    """

    def __init__(self, name: str, function: TextRewardFunction) -> None:
        self.name = name
        self.function = function

    def __call__(self, replies: Replies) -> Tensor:
        """Return the reward of each reply, (N,) float32 on the CPU.

        Raises:
            UserError: The function does not return one finite number per reply.
        """
        returned = self.function(replies.prompt_texts, replies.texts)
        try:
            scores = torch.as_tensor(returned, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"model.reward: {self.name} returned a {type(returned).__name__}; it must return one number per reply"
            ) from error
        if scores.shape != (len(replies.texts),):
            raise UserError(
                f"model.reward: {self.name} returned shape {tuple(scores.shape)} for {len(replies.texts)} replies; it "
                "must return one number per reply"
            )
        return _require_finite(scores, self.name, replies.texts)


def _require_finite(scores: Tensor, name: str, replies: Sequence[str]) -> Tensor:
    """Return the scores if all are finite; a NaN or infinite reward would turn all weights into NaN."""
    for score, reply in zip(scores.tolist(), replies, strict=True):
        if not abs(score) < float("inf"):
            raise UserError(f"model.reward: {name} returned {score} for the reply {reply[:60]!r}; it must be finite")
    return scores
