"""Group relative policy optimization (GRPO, Shao et al. 2024, https://arxiv.org/abs/2402.03300)."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.losses.rl import grpo_advantages, kl_k3, ppo_policy_loss, token_entropy
from lit_gpt_scratch.tasks.rl.on_policy import OnPolicyModule, require_at_least
from lit_gpt_scratch.tasks.rl.rollouts import Rollouts


class GRPO(OnPolicyModule):
    """GPT trained with GRPO, a variant of PPO that compares replies to the same prompt instead of using a critic.

    All tokens of a reply have the same advantage. The loss includes the KL divergence from the initial policy
    (the ``k3`` estimate), averaged over the tokens of each reply and multiplied by the KL coefficient. If ``scale`` is
    True, the advantages are dimensionless, so the KL coefficient is not in units of reward. Because the KL divergence
    is averaged over tokens, the KL divergence of a whole reply may grow with its length.

    Args:
        group: Number of replies per prompt.
        scale: Whether to divide the advantages (the score minus the group mean) by the group's standard deviation.
        kwargs: Arguments of ``OnPolicyModule``.
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
        """Return the number of replies in ``labels``, of shape (N, T), by which the summed loss is divided."""
        return (labels != IGNORE_INDEX).any(1).sum()

    @override
    def loss_and_count(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the per-reply mean token loss (GRPO paper, Eq. 3) summed over replies, and the number of replies."""
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
