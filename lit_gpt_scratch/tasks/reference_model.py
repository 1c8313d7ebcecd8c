"""The frozen initial policy that alignment penalises divergence from."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_gpt_scratch.losses.cross_entropy import token_logprobs
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.lora import disable_lora


class ReferenceModel(nn.Module):
    """The initial policy: a frozen copy, or if only adapters are trained, the same network with them disabled.

    A copy is a submodule of the LightningModule: it moves to its device and is saved in its checkpoints, separately
    from the weights of ``net``, so that a resumed run needs nothing except its checkpoint. It is never trained.

    Args:
        policy: The network to train, before training.
        adapters: Whether only its adapters are trained. Not so if the output head is trained as well: the reference
            would change with it.
    """

    frozen: GPT | None

    def __init__(self, policy: GPT, adapters: bool) -> None:
        super().__init__()
        self.frozen = None if adapters else copy.deepcopy(policy).requires_grad_(False)
        self._policy = (policy,)  # in a tuple, so that it is no submodule
        self.train(False)

    def train(self, mode: bool = True) -> "ReferenceModel":
        """Stay in evaluation mode: no dropout."""
        return super().train(False)

    @property
    def networks(self) -> Sequence[GPT]:
        """The networks that only the reference uses."""
        return () if self.frozen is None else (self.frozen,)

    @contextmanager
    def network(self) -> Iterator[GPT]:
        """The network in evaluation mode; don't use the policy inside this context."""
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
