"""Proximal policy optimization (PPO, https://arxiv.org/abs/1707.06347, https://arxiv.org/abs/2203.02155)."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.rl import (
    gae,
    kl_k1,
    kl_penalized_rewards,
    ppo_policy_loss,
    ppo_value_loss,
    token_entropy,
    whiten,
)
from lit_gpt_scratch.model.output_heads import ScalarHead
from lit_gpt_scratch.tasks.rl.on_policy import OnPolicyModule, require_at_least, require_positive
from lit_gpt_scratch.tasks.rl.rollouts import Rollouts


class PPO(OnPolicyModule):
    """GPT trained with PPO; a second head on the same hidden states, the critic, predicts the return.

    The reward of each token is the negative KL divergence from the initial policy (the ``k1`` estimate), multiplied by
    the KL coefficient; the last token of a reply also receives the reward of the whole reply. One nat of KL divergence
    over a whole reply therefore reduces the total reward by the KL coefficient. Generalized advantage estimation (GAE)
    computes the advantage of each token from these rewards.

    Args:
        gamma: Discount factor per token; 1 disables discounting.
        gae_lambda: Lambda of generalized advantage estimation: 0 estimates the return from the critic's value of the
            next token, 1 from the observed rewards only.
        value_clip: Maximum difference between the critic's clipped prediction and its prediction at the start of the
            rollout phase; null disables clipping.
        value_coefficient: Weight of the value loss.
        whitening: Whether to normalize the advantages in a rollout phase to mean 0 and variance 1.
        kwargs: Arguments of ``OnPolicyModule``.
    """

    def __init__(
        self,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        value_clip: float | None = 0.2,
        value_coefficient: float = 0.1,
        whitening: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_at_least(0, value_coefficient=value_coefficient)
        require_positive(value_clip=value_clip)
        for name, share in (("gamma", gamma), ("gae_lambda", gae_lambda)):
            if not 0 <= share <= 1:
                raise UserError(f"model.{name} is {share}; it must be between 0 and 1")
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.value_clip = value_clip
        self.value_coefficient = value_coefficient
        self.whitening = whitening

    @override
    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            super().configure_model()
            self.value_head = nn.Linear(self.gpt.n_embd, 1, bias=False)
            nn.init.zeros_(self.value_head.weight)  # the critic initially predicts a return of 0

    @property
    @override
    def trained_module(self) -> nn.Module:
        return nn.ModuleDict({"net": self.net, "value_head": self.value_head})

    @override
    def compute_values(self, hidden: Tensor) -> dict[str, Tensor]:
        raw = self.value_head(hidden.to(self.value_head.weight.dtype))
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return {"values": ScalarHead().finalize(raw, self.gpt, self.net.vocab_size)}

    @override
    def compute_advantages(self, rollouts: Rollouts) -> dict[str, Tensor]:
        rows, mask = rollouts.rows, rollouts.rows["labels"] != IGNORE_INDEX
        kl = kl_k1(rows["logprobs"], rows["reference"])
        rewards = kl_penalized_rewards(rows["scores"], kl, mask, rollouts.coefficient)
        advantages, returns = gae(rewards, rows["values"], mask, self.gamma, self.gae_lambda)
        return {"advantages": whiten(advantages, mask) if self.whitening else advantages, "returns": returns}

    @override
    def loss_and_count(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss (policy, value and entropy terms) summed over reply tokens, and the number of tokens."""
        labels = batch["labels"]
        mask = labels != IGNORE_INDEX
        logprobs, logits, hidden = self(batch["input_ids"], labels)
        policy_loss, clipped = ppo_policy_loss(logprobs, batch["logprobs"], batch["advantages"], self.clip)
        values = self.compute_values(hidden)["values"]
        value_loss = ppo_value_loss(values, batch["values"], batch["returns"], self.value_clip)
        self.accumulate_logs(labels, logits, clip_share=clipped[mask].sum(), value_loss=value_loss[mask].sum())
        loss = policy_loss + self.value_coefficient * value_loss  # (B, T)
        if self.entropy_coefficient:
            loss = loss - self.entropy_coefficient * token_entropy(logits)
        return torch.where(mask, loss, 0.0).sum(), self.count_labels(labels)
