"""Torchmetrics that are exact over batches of different sizes and over processes."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryCalibrationError

UNITS_PER_NAT: Final = 2**20


def likelihood_rates(nats: float, tokens: float, n_bytes: float) -> dict[str, float]:
    """``loss`` in nats per token, ``perplexity`` per token and ``bits_per_byte``; NaN without tokens or bytes."""
    loss = nats / tokens if tokens else math.nan
    return {
        "loss": loss,
        "perplexity": loss if math.isnan(loss) else math.exp(min(loss, 700.0)),  # a float overflows beyond e**709
        "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else math.nan,
    }


def mean_auroc(auroc: Tensor, support: Tensor) -> Tensor:
    """Mean one-vs-rest area under the ROC curve, over the classes for which it is defined.

    It is defined for a class with both positive and negative texts.

    Args:
        auroc: Area of each class, (n_classes,) float; ignored where undefined.
        support: Number of texts of each class, (n_classes,).

    Returns:
        A scalar; NaN if no class has one.
    """
    return auroc[(support > 0) & (support < support.sum())].mean()


class LikelihoodMetric(Metric):
    """Loss, perplexity and bits per byte from summed nats, tokens and bytes.

    Bits per byte are comparable between tokenizers, because they are per byte of text; a larger vocabulary has fewer
    and harder tokens, so losses per token are not.

    Nats are summed in fixed point, as int64 multiples of 2**-20. Such a sum does not depend on its order, so the result
    is bitwise the same for any number of processes, and it works on devices without float64. Fixed point has no NaN:
    non-finite sums are counted instead, and a single one makes the result NaN.
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
        """Add summed nats (float scalar), number of tokens, and bytes of their text (int64 scalars)."""
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
    """Weighted mean of a loss over labels.

    ``torchmetrics.MeanMetric`` would either ignore NaN or lose the weights.
    """

    full_state_update = False
    loss_sum: Tensor
    weight_sum: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("loss_sum", "weight_sum"):
            self.add_state(state, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, weight_sum: Tensor) -> None:
        """Add a weighted sum of losses, and the sum of their weights: float scalars."""
        self.loss_sum += loss_sum
        self.weight_sum += weight_sum

    def compute(self) -> Tensor:
        """The mean; NaN without updates."""
        return self.loss_sum / self.weight_sum


class ReplyLoss(Metric):
    """``reply_loss``: mean cross-entropy of the tokens of replies, in nats."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor) -> None:
        """Add summed nats (float scalar) and number of tokens (int64 scalar)."""
        self.nats += nats
        self.tokens += tokens

    def compute(self) -> dict[str, Tensor]:
        """The mean; NaN without tokens."""
        return {"reply_loss": self.nats / self.tokens}


class PreferenceMetrics(Metric):
    """Metrics of pairs of rewards, of a chosen and a rejected reply.

    ``loss`` is a mean over pairs, ``accuracy`` the share of pairs in which the chosen reply has the larger reward,
    ``margin`` the mean difference of the rewards; ``chosen_reward`` and ``rejected_reward`` are their means.

    ``calibration`` is the expected calibration error (Naeini et al. 2015; Guo et al. 2017,
    https://arxiv.org/abs/1706.04599), over 15 bins, of the Bradley-Terry probability that the reply with the larger
    reward is preferred.
    """

    full_state_update = False
    sums: Tensor
    n_correct: Tensor
    n_pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3), dist_reduce_fx="sum")
        for state in ("n_correct", "n_pairs"):
            self.add_state(state, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.calibration = BinaryCalibrationError(n_bins=15, validate_args=False)

    def update(self, losses: Tensor, chosen: Tensor, rejected: Tensor) -> None:
        """Add n pairs (n may be 0): their losses and both rewards, (n,) floats."""
        margins = chosen - rejected
        self.sums += torch.stack([losses.sum(), chosen.sum(), rejected.sum()])
        self.n_correct += (margins > 0).sum()
        self.n_pairs += len(losses)
        self.calibration.update(margins.abs().sigmoid(), (margins > 0).long())

    def compute(self) -> dict[str, Tensor]:
        """Float32 scalars, NaN without pairs."""
        loss, chosen, rejected = self.sums / self.n_pairs
        return {
            "loss": loss,
            "accuracy": self.n_correct / self.n_pairs,
            "margin": chosen - rejected,
            "calibration": self.calibration.compute(),
            "chosen_reward": chosen,
            "rejected_reward": rejected,
        }

    def reset(self) -> None:
        """Reset all states."""
        super().reset()
        self.calibration.reset()


class NamedSums(Metric):
    """Sums by name over batches and processes.

    Args:
        names: Names of the sums.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("sums", torch.zeros(len(names)), dist_reduce_fx="sum")

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add a scalar to each sum."""
        self.sums += torch.stack([values[name] for name in self.names])

    def compute(self) -> dict[str, Tensor]:
        """Float32 scalars by name."""
        return dict(zip(self.names, self.sums, strict=True))
