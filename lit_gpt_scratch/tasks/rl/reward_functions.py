"""How good a reply is: what a reward model says, or a function."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_gpt_scratch.checkpoint.loading import load_reward_model
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.tasks.rl.rollouts import Replies


class RewardFunction(Protocol):
    """What gives replies their rewards."""

    def __call__(self, replies: Replies) -> Tensor:
        """(N,) float32, on the CPU."""


class TextScoring(Protocol):
    """A function of texts, as the data module has it."""

    @property
    def name(self) -> str:
        """As it was given."""

    @property
    def function(self) -> Callable[[Sequence[str], Sequence[str]], Any]:
        """Prompts, and a reply to each -> a number for each."""

    @property
    def unended(self) -> float | None:
        """What a reply counts that does not come to its end; None for what the function says."""


def is_checkpoint_path(name: str | None) -> bool:
    """Whether a reward names a trained model and no function: it is written as a path, or lies there."""
    return name is not None and ("/" in name or Path(name).exists())


class RewardModelScorer:
    """What a trained reward model gives whole texts, prompt and reply, at their last token.

    Args:
        place: Its run, or a checkpoint.
        tokenizer_json: That of the ids which it will be given.
        longest: The most ids of a text.
        at_once: Texts that it reads side by side.
        trusted: The attention class of somebody's own that it may name: to build it is to run that code.

    Raises:
        UserError: There is none, it gives no reward, it was trained with another tokenizer, its context is too short,
            or it names a class that is not trusted.
    """

    def __init__(self, place: str, tokenizer_json: str, longest: int, at_once: int, trusted: str | None) -> None:
        try:
            self.net = load_reward_model(place, tokenizer_json, trusted)
        except UserError as error:
            raise UserError(f"model.reward: {str(error).replace('--trust ', '--model.gpt.attention ')}") from error
        if self.net.block_size < longest:
            raise UserError(
                f"model.reward: the reward model {place} has a context of {self.net.block_size} tokens, but "
                f"data.block_size is {longest}: lower that, or train the reward model with --data.block_size {longest}"
            )
        self.place = place
        self.at_once = at_once

    @torch.no_grad()
    def __call__(self, replies: Replies) -> Tensor:
        """(N,) float32, on the CPU.

        Raises:
            UserError: A reward is no number.
        """
        texts, scores = replies.whole, []
        for first in range(0, len(texts), self.at_once):
            part = texts[first : first + self.at_once]
            lengths = torch.tensor([len(text) for text in part], device=self.net.embedding.weight.device)
            filled = [text + [0] * (int(lengths.max()) - len(text)) for text in part]  # behind, where nothing looks
            scores.append(self.net.forward_pooled(torch.tensor(filled, device=lengths.device), lengths).float().cpu())
        return _finite(torch.cat(scores), self.place, replies.texts)


class TextFunctionScorer:
    """What a function gives replies.

    Args:
        scoring: The function.
    """

    def __init__(self, scoring: TextScoring) -> None:
        self.scoring = scoring

    def __call__(self, replies: Replies) -> Tensor:
        """(N,) float32, on the CPU.

        Raises:
            UserError: It gives something else than a finite number for each.
        """
        name = self.scoring.name
        given = self.scoring.function(replies.asked, replies.texts)
        try:
            scores = torch.as_tensor(given, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"model.reward: {name} gave {type(given).__name__}, no numbers") from error
        if scores.shape != (len(replies.texts),):
            raise UserError(
                f"model.reward: {name} gave a shape of {tuple(scores.shape)} for {len(replies.texts)} replies; it must "
                "give one number for each"
            )
        return _finite(scores, name, replies.texts)


def _finite(scores: Tensor, name: str, replies: Sequence[str]) -> Tensor:
    """A reward that is no number would make every weight none."""
    for score, reply in zip(scores.tolist(), replies, strict=True):
        if not abs(score) < float("inf"):
            raise UserError(f"model.reward: {name} gave {score} for the reply {reply[:60]!r}; it must be finite")
    return scores
