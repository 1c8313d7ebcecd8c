"""Metrics that add up right over batches and processes."""

import math
from typing import Final

import torch
from torch import Tensor
from torchmetrics import Metric

UNITS_PER_NAT: Final = 2**20


def rates(nats: float, tokens: float, n_bytes: float) -> dict[str, float]:
    """``loss`` in nats per token, ``perplexity`` per token and ``bits_per_byte``; NaN of nothing."""
    loss = nats / tokens if tokens else math.nan
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0))
        if loss == loss
        else loss,  # e**700 is the last power that a float can hold
        "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else math.nan,
    }


class LikelihoodMetric(Metric):
    """Loss, perplexity and bits per byte from summed nats, tokens and bytes.

    Bits per byte divides by the text's own length, so that models with different tokenizers can be
    compared: a larger vocabulary has fewer, harder tokens, and the loss per token says little.

    Nats are summed in fixed point, as int64 multiples of 2**-20. Such a sum does not depend on its order,
    so any number of processes reports the same bits, and devices without float64 can hold it. Fixed point
    knows no NaN: sums that are not finite are counted, and a single one makes the result NaN.
    """

    full_state_update = False
    nat_units: Tensor
    tokens: Tensor
    bytes: Tensor
    not_finite: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("nat_units", "tokens", "bytes", "not_finite"):
            self.add_state(state, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor, n_bytes: Tensor) -> None:
        """Add summed nats (float scalar), counted tokens and their text's bytes (int64 scalars)."""
        self.nat_units += (nats.nan_to_num(0.0, 0.0, 0.0) * UNITS_PER_NAT).round().long()
        self.not_finite += ~nats.isfinite()
        self.tokens += tokens
        self.bytes += n_bytes

    def compute(self) -> dict[str, Tensor]:
        """``loss`` in nats per token, ``perplexity`` per token and ``bits_per_byte``: float32 scalars."""
        nats, tokens, n_bytes = self.nat_units.item() / UNITS_PER_NAT, self.tokens.item(), self.bytes.item()
        if self.not_finite:
            nats = math.nan
        values = rates(nats, tokens, n_bytes)
        return {name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in values.items()}


class MeanLoss(Metric):
    """The mean of a loss over labels, each with its weight.

    Not ``torchmetrics.MeanMetric``, which either leaves out what is not a number or forgets the weights.
    """

    full_state_update = False
    lost: Tensor
    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("lost", "counted"):
            self.add_state(state, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, lost: Tensor, counted: Tensor) -> None:
        """Add a sum of losses, and what their labels weigh together: float scalars."""
        self.lost += lost
        self.counted += counted

    def compute(self) -> Tensor:
        """The mean; NaN of nothing."""
        return self.lost / self.counted
