"""TorchMetrics metrics that are exact for batches of different sizes and for any number of processes."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryCalibrationError

UNITS_PER_NAT: Final = 2**20


def likelihood_rates(nats: float, tokens: float, n_bytes: float) -> dict[str, float]:
    """Return ``loss`` (nats per token), ``perplexity`` (per token) and ``bits_per_byte``.

    ``loss`` and ``perplexity`` are NaN if there are no tokens, and ``bits_per_byte`` is NaN if there are no bytes.
    """
    loss = nats / tokens if tokens else math.nan
    return {
        "loss": loss,
        "perplexity": loss if math.isnan(loss) else math.exp(min(loss, 700.0)),  # a float overflows beyond e**709
        "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else math.nan,
    }


def mean_auroc(auroc: Tensor, support: Tensor) -> Tensor:
    """Return the mean one-vs-rest area under the ROC curve over the classes for which it is defined.

    The area is defined for a class if at least one example belongs to the class and at least one does not.

    Args:
        auroc: Area under the ROC curve for each class, of shape (n_classes,); undefined values are ignored.
        support: Number of examples in each class, of shape (n_classes,).

    Returns:
        A scalar, or NaN if the area is undefined for all classes.
    """
    return auroc[(support > 0) & (support < support.sum())].mean()


class LikelihoodMetric(Metric):
    """Loss, perplexity and bits per byte, computed from the total log-likelihood and the token and byte counts.

    Bits per byte are comparable between tokenizers. Losses per token are not: with a larger vocabulary, text is split
    into fewer tokens, which are harder to predict.

    Nats are summed in fixed point, as int64 multiples of 2**-20. The sum does not depend on the order of its terms, so
    the result is bitwise identical for any number of processes. Fixed-point sums are also supported on devices without
    float64. They cannot represent NaN, so non-finite inputs are counted separately, and a single non-finite input makes
    the result NaN.
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
        """Add a batch's negative log-likelihood in nats (float scalar) and token and byte counts (int64 scalars)."""
        self.nat_units += (nats.nan_to_num(0.0, 0.0, 0.0) * UNITS_PER_NAT).round().long()
        self.not_finite += ~nats.isfinite()
        self.tokens += tokens
        self.bytes += n_bytes

    def compute(self) -> dict[str, Tensor]:
        """Return ``loss`` (nats per token), ``perplexity`` (per token) and ``bits_per_byte`` as float32 scalars."""
        nats, tokens, n_bytes = self.nat_units.item() / UNITS_PER_NAT, self.tokens.item(), self.bytes.item()
        if self.not_finite:
            nats = math.nan
        values = likelihood_rates(nats, tokens, n_bytes)
        return {name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in values.items()}


class WeightedMeanLoss(Metric):
    """Weighted mean of the loss over labels.

    ``torchmetrics.MeanMetric`` is not used, because it would either ignore NaN or discard the weights.
    """

    full_state_update = False
    loss_sum: Tensor
    weight_sum: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("loss_sum", "weight_sum"):
            self.add_state(state, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, weight_sum: Tensor) -> None:
        """Add a batch's weighted loss sum and the sum of its weights (float scalars)."""
        self.loss_sum += loss_sum
        self.weight_sum += weight_sum

    def compute(self) -> Tensor:
        """Return the weighted mean as a scalar, or NaN if the sum of the weights is 0."""
        return self.loss_sum / self.weight_sum


class ReplyLoss(Metric):
    """Mean cross-entropy in nats per reply token, reported as ``reply_loss``."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor) -> None:
        """Add a batch's negative log-likelihood in nats (float scalar) and number of reply tokens (int64 scalar)."""
        self.nats += nats
        self.tokens += tokens

    def compute(self) -> dict[str, Tensor]:
        """Return ``reply_loss`` as a float32 scalar, or NaN if there are no tokens."""
        return {"reply_loss": self.nats / self.tokens}


class PreferenceMetrics(Metric):
    """Metrics for pairs of a chosen and a rejected reply.

    ``loss`` is the mean loss per pair, ``accuracy`` is the fraction of pairs in which the chosen reply has the larger
    reward, and ``margin`` is the mean difference between the two rewards. ``chosen_reward`` and ``rejected_reward`` are
    the mean rewards.

    ``calibration`` is the expected calibration error with 15 bins (Naeini et al. 2015; Guo et al. 2017,
    https://arxiv.org/abs/1706.04599) of the Bradley-Terry probability that the reply with the larger reward is
    preferred.
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
        """Add the losses, chosen rewards and rejected rewards of n pairs, float tensors of shape (n,); n may be 0."""
        margins = chosen - rejected
        self.sums += torch.stack([losses.sum(), chosen.sum(), rejected.sum()])
        self.n_correct += (margins > 0).sum()
        self.n_pairs += len(losses)
        self.calibration.update(margins.abs().sigmoid(), (margins > 0).long())

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics as float32 scalars keyed by name, or NaN if there are no pairs."""
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
        """Reset the metric, including its calibration metric."""
        super().reset()
        self.calibration.reset()


class NamedSums(Metric):
    """Metric that sums named scalars over batches and processes.

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
        """Add each scalar in ``values`` to the running sum with the same name."""
        self.sums += torch.stack([values[name] for name in self.names])

    def compute(self) -> dict[str, Tensor]:
        """Return the sums as float32 scalars keyed by name."""
        return dict(zip(self.names, self.sums, strict=True))
