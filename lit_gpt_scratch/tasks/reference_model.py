"""Frozen initial policy, relative to which DPO, PPO and GRPO compute their KL penalty."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_gpt_scratch.losses.cross_entropy import token_logprobs
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.lora import disable_lora


class ReferenceModel(nn.Module):
    """Initial policy: a frozen copy or, if only adapters are trained, the policy with its adapters disabled.

    The copy is a submodule of the LightningModule. It is moved to the module's device and saved in its checkpoints,
    separately from the weights of ``net``, so that a run can be resumed from its checkpoint alone. It is never trained.

    Args:
        policy: Network of the policy, before training.
        adapters: Whether only adapters are trained. Must be False if the output head is trained as well, because
            disabling the adapters would not restore the initial head.
    """

    frozen: GPT | None

    def __init__(self, policy: GPT, adapters: bool) -> None:
        super().__init__()
        self.frozen = None if adapters else copy.deepcopy(policy).requires_grad_(False)
        self._policy = (policy,)  # in a tuple, so that it is not registered as a submodule
        self.train(False)

    def train(self, mode: bool = True) -> "ReferenceModel":
        """Keep the module in evaluation mode, regardless of ``mode``, so that dropout is never applied."""
        return super().train(False)

    @property
    def networks(self) -> Sequence[GPT]:
        """Networks that are used only by the reference model."""
        return () if self.frozen is None else (self.frozen,)

    @contextmanager
    def network(self) -> Iterator[GPT]:
        """Context manager that yields the reference network in evaluation mode.

        The policy must not be used inside the context.
        """
        if self.frozen is not None:
            yield self.frozen
            return
        [policy] = self._policy
        training = policy.training
        policy.eval()
        try:
            with disable_lora(policy):
                yield policy
        finally:
            policy.train(training)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Compute the log-probability of each label, without gradients.

        Args:
            input_ids: Token ids, int64 tensor of shape (B, T).
            labels: Labels, int64 tensor of shape (B, T).

        Returns:
            Log-probabilities in nats, in at least float32, of shape (B, T); 0 where the label is ``IGNORE_INDEX``
            (-100).
        """
        with self.network() as net:
            return token_logprobs(net(input_ids), labels)
