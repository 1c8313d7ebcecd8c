"""Auxiliary losses and load of the experts in a training run, for models whose blocks are mixtures of experts."""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.feed_forward import MixtureOfExperts
from lit_gpt_scratch.model.moe import count_choices, load_balance_loss, router_z_loss

EXPERT_LOAD_KEY: Final = "expert_load"
"""Key of the load of the last step in a checkpoint."""


class ExpertBalancing:
    """Computes the auxiliary losses of each micro-batch, and counts the tokens of each expert in each optimizer step.

    Args:
        net: Network with mixtures of experts.

    Attributes:
        load: Number of tokens per expert in the last complete step, over all processes, int64 tensor of shape
            (n_layer, n_experts).
    """

    def __init__(self, net: GPT) -> None:
        self.net = net
        self.routers = [module.router for module in net.modules() if isinstance(module, MixtureOfExperts)]
        self._load = self.load = torch.zeros(len(self.routers), net.config.n_experts, dtype=torch.int64)
        self._scores: list[Tensor] = []
        self._is_token: Tensor | None = None

    def record(self) -> None:
        """Record the router logits of the forward passes until ``loss`` is called."""
        self.net.recorded_router_logits = []

    def loss(self, is_token: Tensor | None = None) -> Tensor:
        """Add the recorded forward passes of a micro-batch to the load, and return their mean auxiliary loss.

        Args:
            is_token: Bool tensor of shape (B, T) that is False at padding, which is not counted; None if unknown.

        Returns:
            The sum of the blocks' auxiliary losses, multiplied by their coefficients, a scalar.
        """
        recorded, self.net.recorded_router_logits = self.net.recorded_router_logits or [], None
        config, n_layer = self.net.config, len(self.routers)
        total = torch.zeros((), device=recorded[0].device if recorded else None)
        self._load, self._scores, self._is_token = self._load.to(total.device), [], is_token
        for n, logits in enumerate(recorded):
            routing = self.routers[n % n_layer].route(logits)
            self._load[n % n_layer] += count_choices(routing.experts, config.n_experts, is_token).sum(0)
            self._scores.append(routing.scores.detach())
            if config.load_balance_loss:
                total = total + config.load_balance_loss * load_balance_loss(routing, is_token)
            if config.router_z_loss:
                total = total + config.router_z_loss * router_z_loss(logits, is_token)
        return total * n_layer / max(1, len(recorded))

    def end_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """Complete the load of an optimizer step.

        Args:
            add_up: Function that adds up a tensor over all processes.
        """
        self.load, self._load = add_up(self._load), torch.zeros_like(self._load)

    @torch.no_grad()
    def update_biases(self) -> None:
        """Raise the biases of experts whose load was below the mean of their block, and lower those of the others.

        The biases of frozen routers do not change.
        """
        rate = self.net.config.expert_bias_rate
        for router, load in zip(self.routers, self.load.double(), strict=True):
            if rate and router.balance_bias is not None and router.weight.requires_grad:
                router.balance_bias += rate * (load.mean() - load).sign().to(router.balance_bias.dtype)

    def metrics(self) -> dict[str, Tensor]:
        """Return metrics of the last step, scalars keyed by name.

        - ``max_load``: Load of the expert with the most tokens, relative to the mean load of its block.
        - ``unused``: Fraction of the experts that no token chose.
        - ``load_entropy``: Entropy of the load of the block where it is least even: 1 if the loads are equal, 0 if all
          tokens chose the same experts.
        - ``router_entropy``: Entropy of a token's scores relative to that of equal scores, averaged over the blocks and
          the tokens of this process in the last micro-batch.
        """
        n_experts, k = self.net.config.n_experts, self.net.config.experts_per_token
        share = self.load.double() / self.load.sum(-1, keepdim=True).clamp(min=1)  # (n_layer, n_experts)
        entropy = torch.special.entr(share).sum(-1).min()
        least, largest = math.log(k), math.log(n_experts)
        found = {
            "max_load": share.max() * n_experts,
            "unused": (share == 0).double().mean(),
            "load_entropy": (entropy - least) / (largest - least) if k < n_experts else torch.ones(()),
        }
        if self._scores and n_experts > 1:
            scores = torch.stack(self._scores)  # (forward passes * n_layer, B, T, n_experts)
            normalized = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            entropies = torch.special.entr(normalized).sum(-1)
            tokens = torch.ones_like(entropies) if self._is_token is None else self._is_token.expand_as(entropies)
            found["router_entropy"] = (entropies * tokens).sum() / tokens.sum().clamp(min=1) / largest
        return found


def find_tokens(batch: Any) -> Tensor | None:
    """Return where the rows of a batch have tokens, not padding: bool tensor of shape (B, T), or None if unknown.

    Without ``lengths``, tokens after the last label of a row are padding.
    """
    if "input_ids" not in batch:  # an RL policy generates its own inputs
        return None
    if "lengths" in batch:
        lengths: Tensor = batch["lengths"]
        return torch.arange(batch["input_ids"].size(1), device=lengths.device) < lengths[:, None]
    labels: Tensor = batch["labels"]
    return (labels != IGNORE_INDEX).int().flip(1).cummax(1).values.flip(1).bool()
