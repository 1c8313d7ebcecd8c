"""Group relative policy optimization (Shao et al. 2024, https://arxiv.org/abs/2402.03300): PPO without a critic."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.losses.rl import grpo_advantages, kl_k3, ppo_policy_loss, token_entropy
from lit_gpt_scratch.tasks.rl.on_policy import OnPolicyModule, require_at_least
from lit_gpt_scratch.tasks.rl.rollouts import Rollouts


class GRPO(OnPolicyModule):
    """A policy that compares several replies to a prompt with each other, and so needs no critic.

    Every token of a reply has the same advantage. The KL from the start is a part of the loss: the coefficient times
    the mean over a reply's tokens of ``k3``, beside advantages that have no unit. It is no price in reward, and a long
    reply may go as far from the start with each of its tokens as a short one.

    Args:
        group: Replies to a prompt.
        scale: Divide how far a reply is from its group's mean by the group's standard deviation.
        kwargs: As for ``OnPolicyModule``.
    """

    def __init__(self, group: int = 8, scale: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_at_least(2, group=group)
        self.group = group
        self.scale = scale

    @override
    def advantages(self, rollouts: Rollouts) -> dict[str, Tensor]:
        return {"advantages": grpo_advantages(rollouts.rows["scores"], self.group, self.scale)}

    @override
    def loss_and_count(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The mean over replies of the mean over their tokens (equation 3)."""
        labels = batch["labels"]
        within = labels != IGNORE_INDEX
        logprobs, logits, _ = self(batch["input_ids"], labels)
        policy, held = ppo_policy_loss(logprobs, batch["logprobs"], batch["advantages"][:, None], self.clip)
        self.note(labels, logits, clip_share=held[within].sum())
        assert self._rollouts is not None
        lost = policy + self._rollouts.coefficient * kl_k3(logprobs, batch["reference"])
        if self.entropy_coefficient:
            lost = lost - self.entropy_coefficient * token_entropy(logits)
        each = torch.where(within, lost, 0.0).sum(1) / within.sum(1).clamp(min=1)
        return each.sum(), within.any(1).sum()
