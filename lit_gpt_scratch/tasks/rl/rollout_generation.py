"""Generate and score rollouts, i.e. replies to prompts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import DataInfo, DataSplit
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.local_shard import device_of
from lit_gpt_scratch.tasks.rl.reward_functions import RewardFunction
from lit_gpt_scratch.tasks.rl.rollouts import Replies, generate_replies


@dataclass
class RolloutGenerator:
    """Generator that samples replies to prompts and scores them.

    Attributes:
        net: Network of the policy.
        data: Properties of the data, including the prompts.
        score: Function that computes the reward of each reply.
        unended_score: Score of truncated replies; if None, ``score`` also applies to them.
        temperature: Sampling temperature.
        batch_size: Number of replies to generate in one batch.
    """

    net: GPT
    data: DataInfo
    score: RewardFunction
    unended_score: float | None
    temperature: float
    batch_size: int

    def generate(self, split: DataSplit, indices: Sequence[int], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Generate and score one reply to each prompt; the network must be in evaluation mode.

        Args:
            split: Data split of the prompts.
            indices: Indices of the N prompts.
            seeds: Random seed of each reply.

        Returns:
            Tensors keyed by name: ``input_ids`` and ``labels``, int64 tensors of shape (N, block_size); ``ended`` and
            ``scores``, float32 tensors of shape (N,). If the data module defines a reply check, also ``true_reward``, a
            float32 tensor of shape (N,), which is 1 for complete replies that pass the check and 0 otherwise.

        Raises:
            UserError: A score is not finite.
        """
        prompts, stop_ids = self.data.prompts, self.data.stop_ids or {self.data.end_of_text}
        assert prompts is not None
        prompt_ids, prompt_texts = prompts.lookup(split, indices)
        ids = generate_replies(
            self.net, prompt_ids, prompts.reply_tokens, self.temperature, seeds, stop_ids, self.batch_size
        )
        ended = [reply[-1] in stop_ids for reply in ids]
        texts = [prompts.decode(reply[:-1] if last else reply) for reply, last in zip(ids, ended, strict=True)]
        replies = Replies(prompt_ids, prompt_texts, ids, texts, ended)
        scores = self.score(replies)
        if self.unended_score is not None:
            scores = torch.where(torch.tensor(ended), scores, self.unended_score)
        rows = replies.rows(self.data.block_size, self.data.end_of_text) | {"scores": scores}
        if (check := prompts.reply_check()) is not None:
            checked = [float(last and check(text)) for last, text in zip(ended, texts, strict=True)]
            rows["true_reward"] = torch.tensor(checked)
        device = device_of(self.net.embedding.weight)
        return {name: values.to(device) for name, values in rows.items()}
