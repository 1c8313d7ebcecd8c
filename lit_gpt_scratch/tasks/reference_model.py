"""The policy that alignment begins with, and that what is trained is held to."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_gpt_scratch.losses.cross_entropy import token_logprobs
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.lora import disable_lora


class ReferenceModel(nn.Module):
    """The start, as it stays: a frozen copy of it, or with adapters the same network while they are switched off.

    A copy is a part of the task: it moves to the task's device and lies in its checkpoints, apart from the weights of
    ``net``, so that a run that goes on needs nothing beside its checkpoint. It is never trained.

    Args:
        policy: What is trained; as yet it is the start.
        adapters: Whether nothing but adapters of it is trained. A head that is trained beside them is no such case: it
            would move under the reference.
    """

    frozen: GPT | None

    def __init__(self, policy: GPT, adapters: bool) -> None:
        super().__init__()
        self.frozen = None if adapters else copy.deepcopy(policy).requires_grad_(False)
        self._policy = (policy,)  # no part of this module
        self.train(False)

    def train(self, mode: bool = True) -> "ReferenceModel":
        """It always evaluates: nothing is dropped."""
        return super().train(False)

    @property
    def networks(self) -> Sequence[GPT]:
        """Those of its own."""
        return () if self.frozen is None else (self.frozen,)

    @contextmanager
    def network(self) -> Iterator[GPT]:
        """The network, in evaluation mode; meanwhile the policy is not to be used."""
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
        """Log-probability of each label, without a gradient.

        Args:
            input_ids: (B, T) int64.
            labels: (B, T) int64.

        Returns:
            (B, T) nats, at least float32; 0 where the label is ``IGNORE_INDEX`` (-100).
        """
        with self.network() as net:
            return token_logprobs(net(input_ids), labels)
