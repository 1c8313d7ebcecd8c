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
    """A policy that compares several replies to the same prompt, and so needs no critic.

    Every token of a reply has the same advantage. The KL from the initial policy is a term of the loss: the coefficient
    times the mean over a reply's tokens of the ``k3`` estimator, next to advantages that have no unit. So it isn't
    priced in reward, and each token of a long reply may diverge as far as a token of a short one.

    Args:
        group: Replies per prompt.
        scale: Divide a reply's difference from its group's mean by the group's standard deviation.
        kwargs: As for ``OnPolicyModule``.
    """

    def __init__(self, group: int = 8, scale: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_at_least(2, group=group)
        self.group = group
        self.scale = scale

    @override
    def compute_advantages(self, rollouts: Rollouts) -> dict[str, Tensor]:
        return {"advantages": grpo_advantages(rollouts.rows["scores"], self.group, self.scale)}

    @override
    def count_labels(self, labels: Tensor) -> Tensor:
        """The number of replies, as the loss is a mean over replies: (N, T) -> scalar."""
        return (labels != IGNORE_INDEX).any(1).sum()

    @override
    def loss_and_count(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The mean over replies of the mean over their tokens (equation 3), as a sum over replies and their number."""
        labels = batch["labels"]
        mask = labels != IGNORE_INDEX
        logprobs, logits, _ = self(batch["input_ids"], labels)
        policy_loss, clipped = ppo_policy_loss(logprobs, batch["logprobs"], batch["advantages"][:, None], self.clip)
        self.accumulate_logs(labels, logits, clip_share=clipped[mask].sum())
        assert self.rollouts is not None
        loss = policy_loss + self.rollouts.coefficient * kl_k3(logprobs, batch["reference"])  # (B, T)
        if self.entropy_coefficient:
            loss = loss - self.entropy_coefficient * token_entropy(logits)
        reply_losses = torch.where(mask, loss, 0.0).sum(1) / mask.sum(1).clamp(min=1)  # (B,)
        return reply_losses.sum(), self.count_labels(labels)
