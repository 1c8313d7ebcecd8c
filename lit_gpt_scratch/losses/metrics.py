"""Metrics that add up right over batches and processes."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryCalibrationError

UNITS_PER_NAT: Final = 2**20


def likelihood_rates(nats: float, tokens: float, n_bytes: float) -> dict[str, float]:
    """``loss`` in nats per token, ``perplexity`` per token and ``bits_per_byte``; NaN of nothing."""
    loss = nats / tokens if tokens else math.nan
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0))
        if loss == loss
        else loss,  # e**700 is the last power that a float can hold
        "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else math.nan,
    }


def mean_auroc(each: Tensor, texts: Tensor) -> Tensor:
    """The mean area under the ROC curve, over the classes that have one.

    A curve is of a class's texts against the others', so it takes both.

    Args:
        each: The area of each class, (n,) float, anything where there is no curve.
        texts: How many there are of each class, (n,).

    Returns:
        A scalar; NaN if there is no curve.
    """
    return each[(texts > 0) & (texts < texts.sum())].mean()


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
        values = likelihood_rates(nats, tokens, n_bytes)
        return {name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in values.items()}


class WeightedMeanLoss(Metric):
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


class ReplyLoss(Metric):
    """``reply_loss``: the mean loss of the tokens of replies, in nats."""

    full_state_update = False
    lost: Tensor
    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("lost", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("counted", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor) -> None:
        """Add summed nats (float scalar) and counted tokens (int64 scalar)."""
        self.lost += nats
        self.counted += tokens

    def compute(self) -> dict[str, Tensor]:
        """The mean; NaN of nothing."""
        return {"reply_loss": self.lost / self.counted}


class PreferenceMetrics(Metric):
    """How well rewards tell which of two replies is preferred.

    ``loss`` is a mean over pairs, ``accuracy`` the share of pairs in which the preferred reply has the larger reward,
    ``margin`` by how much on average; it is the difference of the means ``chosen_reward`` and ``rejected_reward``.

    ``calibration`` is the expected calibration error (Naeini et al. 2015; Guo et al. 2017,
    https://arxiv.org/abs/1706.04599) of the probability that Bradley and Terry give the reply with the larger reward:
    by how much, over 15 bins of it, that differs from how often it is indeed the preferred one.
    """

    full_state_update = False
    sums: Tensor
    right: Tensor
    pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3), dist_reduce_fx="sum")
        for state in ("right", "pairs"):
            self.add_state(state, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.calibration = BinaryCalibrationError(n_bins=15, validate_args=False)

    def update(self, losses: Tensor, chosen: Tensor, rejected: Tensor) -> None:
        """Add pairs: what is lost on each, and the two rewards, (n,) floats; n may be 0."""
        margins = chosen - rejected
        self.sums += torch.stack([losses.sum(), chosen.sum(), rejected.sum()])
        self.right += (margins > 0).sum()
        self.pairs += len(losses)
        self.calibration.update(margins.abs().sigmoid(), (margins > 0).long())

    def compute(self) -> dict[str, Tensor]:
        """The figures: float32 scalars, NaN of nothing."""
        loss, chosen, rejected = self.sums / self.pairs
        figures = {"loss": loss, "accuracy": self.right / self.pairs, "margin": chosen - rejected}
        calibration = self.calibration.compute()
        return {**figures, "calibration": calibration, "chosen_reward": chosen, "rejected_reward": rejected}

    def reset(self) -> None:
        """Begin anew."""
        super().reset()
        self.calibration.reset()


class NamedSums(Metric):
    """Sums by name, over batches and processes; what is made of them is the caller's to know.

    Args:
        names: Of the sums.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("sums", torch.zeros(len(names)), dist_reduce_fx="sum")

    def update(self, more: Mapping[str, Tensor]) -> None:
        """Add a scalar of each name."""
        self.sums += torch.stack([more[name] for name in self.names])

    def compute(self) -> dict[str, Tensor]:
        """By name: float32 scalars."""
        return dict(zip(self.names, self.sums, strict=True))
