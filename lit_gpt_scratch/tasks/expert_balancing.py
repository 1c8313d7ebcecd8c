"""Auxiliary losses and load of the experts in a training run, for models whose blocks are mixtures of experts."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.feed_forward import MixtureOfExperts
from lit_gpt_scratch.model.moe import load_balance_loss, router_z_loss


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
        self._balance = self._entropy = torch.zeros(())

    def record(self) -> None:
        """Record the router logits of the forward passes until ``loss`` is called."""
        self.net.recorded_router_logits = []

    def loss(self) -> Tensor:
        """Add the recorded forward passes of a micro-batch to the load, and return their mean auxiliary loss.

        Returns:
            The sum of the blocks' auxiliary losses, multiplied by their coefficients, a scalar.
        """
        recorded, self.net.recorded_router_logits = self.net.recorded_router_logits, None
        if not recorded:
            return torch.zeros((), device=self._load.device)
        config, n_layer = self.net.config, len(self.routers)
        routings = [self.routers[n % n_layer].route(logits) for n, logits in enumerate(recorded)]
        counts = [torch.bincount(routing.experts.flatten(), minlength=config.n_experts) for routing in routings]
        self._load = self._load.to(counts[0].device) + torch.stack(counts).view(-1, *self._load.shape).sum(0)
        balance = torch.stack([load_balance_loss(routing) for routing in routings]).mean()
        shares = [routing.scores / routing.scores.sum(-1, keepdim=True) for routing in routings]
        self._balance = balance.detach()
        self._entropy = torch.stack([torch.special.entr(share).sum(-1).mean() for share in shares]).mean().detach()
        z_loss = torch.stack([router_z_loss(logits) for logits in recorded]).mean()
        return n_layer * (config.load_balance_loss * balance + config.router_z_loss * z_loss)

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
        - ``load_entropy``: Entropy of the load of the block where it is least even, relative to that of equal loads.
        - ``router_entropy``: Entropy of a token's scores, averaged over tokens and blocks, relative to that of equal
          scores.
        - ``load_balance_loss``: The loss without its coefficient, averaged over the blocks.

        The last two are those of the last micro-batch of this process.
        """
        share = self.load.double() / self.load.sum(-1, keepdim=True)  # (n_layer, n_experts)
        largest = math.log(max(2, share.size(-1)))
        return {
            "max_load": share.max() * share.size(-1),
            "unused": (share == 0).double().mean(),
            "load_entropy": torch.special.entr(share).sum(-1).min() / largest,
            "router_entropy": self._entropy / largest,
            "load_balance_loss": self._balance,
        }
