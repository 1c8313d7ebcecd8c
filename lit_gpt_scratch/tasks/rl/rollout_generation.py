"""A network replies to prompts, and is told how good that was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.tasks.gpt_module import AnyTokenizer, TokenData
from lit_gpt_scratch.tasks.rl.reward_functions import RewardFunction, TextScoring
from lit_gpt_scratch.tasks.rl.rollouts import Replies, generate_replies


class Decoder(AnyTokenizer, Protocol):
    """A tokenizer that is asked for texts, too."""

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""


class PromptData(TokenData, Protocol):
    """What a policy reads from the data module, once that is set up."""

    tokenizer: Decoder
    reply_tokens: int

    @property
    def reply_check(self) -> Callable[[str], bool] | None:
        """Whether a reply is as it should be; None where only a person could say."""

    @property
    def rank_rows(self) -> list[int]:
        """The rows of a phase that this process writes."""

    def prompt_count(self, side: str) -> int:
        """How many a side has."""

    def asked(self, side: str, numbers: Sequence[int]) -> tuple[list[list[int]], list[str]]:
        """Prompts by their numbers: ids, and texts."""

    def drawn(self, numbers: Sequence[int]) -> list[int]:
        """Which training prompts come as the first, second and so on of the run."""

    def scoring(self, name: str | None) -> TextScoring:
        """A function of texts that says how good a reply is."""


@dataclass
class RolloutGenerator:
    """Lets a network reply to prompts.

    Attributes:
        net: The network.
        data: Has the prompts.
        score: Gives the replies their rewards.
        unended: What a reply counts that does not come to its end; None for what it is scored.
        temperature: At which it writes.
        at_once: Replies that are written side by side.
    """

    net: GPT
    data: PromptData
    score: RewardFunction
    unended: float | None
    temperature: float
    at_once: int

    def replies(self, side: str, numbers: Sequence[int], seeds: Sequence[int]) -> dict[str, Tensor]:
        """A reply to each prompt; the network has to be in evaluation mode.

        Args:
            side: Of the prompts.
            numbers: Of the prompts, (N,).
            seeds: One a reply.

        Returns:
            ``input_ids`` and ``labels``, (N, block_size); ``ended``, ``scores``, and where the data can judge
            ``true_reward``, (N,) float32.

        Raises:
            UserError: A score is no finite number.
        """
        tokenizer, end = self.data.tokenizer, self.data.tokenizer.end_of_text
        prompts, asked = self.data.asked(side, numbers)
        ids = generate_replies(self.net, prompts, self.data.reply_tokens, self.temperature, seeds, end, self.at_once)
        ended = [reply[-1] == end for reply in ids]
        texts = [tokenizer.decode(reply[:-1] if last else reply) for reply, last in zip(ids, ended, strict=True)]
        replies = Replies(prompts, asked, ids, texts, ended)
        scores = self.score(replies)
        if self.unended is not None:
            scores = torch.where(torch.tensor(ended), scores, self.unended)
        rows = replies.rows(self.data.block_size, end) | {"scores": scores}
        if (judge := self.data.reply_check) is not None:
            true = [float(last and judge(text)) for last, text in zip(ended, texts, strict=True)]
            rows["true_reward"] = torch.tensor(true)
        device = self.net.embedding.weight.device
        return {name: values.to(device) for name, values in rows.items()}
