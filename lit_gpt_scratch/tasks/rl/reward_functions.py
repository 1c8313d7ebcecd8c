"""Reward functions, which score replies with a reward model or with a function of prompts and replies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import TextRewardFunction
from lit_gpt_scratch.checkpoint.init_from import explain_untrusted
from lit_gpt_scratch.checkpoint.loading import load_reward_model
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model.local_shard import device_of
from lit_gpt_scratch.tasks.rl.rollouts import Replies
from lit_gpt_scratch.trust import Trusted


class RewardFunction(Protocol):
    """Callable that computes the reward of each reply."""

    def __call__(self, replies: Replies) -> Tensor:
        """Return the reward of each of N replies, float32 tensor of shape (N,) on the CPU."""


def is_checkpoint_path(name: str | None) -> bool:
    """Return whether a reward is specified by the path of a trained model rather than the name of a function.

    A name is treated as a path if it contains a slash, or if a file or folder with this name exists.
    """
    return name is not None and ("/" in name or Path(name).exists())


class RewardModelScorer:
    """Reward function that uses a trained reward model, which scores each reply at its last token.

    Args:
        place: Run folder or checkpoint of the reward model.
        tokenizer_json: The policy's ``tokenizer.json`` as a string.
        max_length: Maximum number of tokens in a prompt and its reply.
        batch_size: Number of replies per forward pass.
        trusted: Import paths that the checkpoint may import, such as a custom attention class. Building the model runs
            the imported code.

    Raises:
        UserError: The checkpoint does not exist, is not a reward model, was trained with another tokenizer, has too
            short a context, or refers to code that is not trusted.
    """

    def __init__(self, place: str, tokenizer_json: str, max_length: int, batch_size: int, trusted: Trusted) -> None:
        with explain_untrusted("model.reward"):
            self.net = load_reward_model(place, tokenizer_json, trusted)
        if self.net.block_size < max_length:
            raise UserError(
                f"model.reward: the reward model {place} has a context of {self.net.block_size} tokens, but "
                f"data.block_size is {max_length}; lower data.block_size, or train the reward model with "
                f"--data.block_size {max_length}"
            )
        self.place = place
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, replies: Replies) -> Tensor:
        """Return the reward of each of N replies, float32 tensor of shape (N,) on the CPU.

        Raises:
            UserError: A reward is not finite.
        """
        texts, scores = replies.full_ids, []
        device = device_of(self.net.embedding.weight)
        for first in range(0, len(texts), self.batch_size):
            part = texts[first : first + self.batch_size]
            lengths = torch.tensor([len(text) for text in part], device=device)
            padded = [text + [0] * (int(lengths.max()) - len(text)) for text in part]  # no token attends to padding
            scores.append(self.net.forward_pooled(torch.tensor(padded, device=device), lengths).float().cpu())
        return _require_finite(torch.cat(scores), self.place, replies.texts)


class TextFunctionScorer:
    """Reward function that calls a Python function with the prompt and reply texts.

    Args:
        name: Name of the reward, used in error messages.
        function: Callable that maps a list of prompts and a list of replies, one per prompt, to one number per reply.
    """

    def __init__(self, name: str, function: TextRewardFunction) -> None:
        self.name = name
        self.function = function

    def __call__(self, replies: Replies) -> Tensor:
        """Return the reward of each of N replies, float32 tensor of shape (N,) on the CPU.

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
    """Check that all scores are finite and return them; a NaN or infinite reward would turn all weights into NaN."""
    for score, reply in zip(scores.tolist(), replies, strict=True):
        if not abs(score) < float("inf"):
            raise UserError(f"model.reward: {name} returned {score} for the reply {reply[:60]!r}; it must be finite")
    return scores
