"""Base class of reward models and DPO, which train on pairs of a chosen and a rejected reply."""

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from lit_gpt_scratch.batch_types import STEP_KEYS, PairBatch
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.metrics import PreferenceMetrics
from lit_gpt_scratch.tasks.gpt_module import GPTModule


class PairComparison(NamedTuple):
    """Losses and rewards of n pairs, as float tensors of shape (n,); padding pairs are excluded.

    Attributes:
        losses: Loss of each pair.
        chosen: Reward of the chosen reply in each pair.
        rejected: Reward of the rejected reply in each pair.
    """

    losses: Tensor
    chosen: Tensor
    rejected: Tensor


class PairwiseModule(GPTModule):
    """Base class for a GPT trained on preference pairs.

    Subclasses define ``compare``. The validation and test metrics are ``PreferenceMetrics``.
    """

    metrics: PreferenceMetrics | MetricCollection

    def compare(self, batch: PairBatch) -> PairComparison:
        """Compute the loss and the rewards of each pair in a batch."""
        raise NotImplementedError

    @override
    def loss_and_count(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        losses = self.compare(batch).losses
        return losses.sum(), torch.tensor(len(losses), device=losses.device)

    @override
    def build_metrics(self) -> PreferenceMetrics | MetricCollection:
        if not self.data_info.has_pairs:
            name = self.data_info.name
            task = type(self).__name__
            raise UserError(f"data: {name} does not provide preference pairs; {task} requires --data Preferences")
        return PreferenceMetrics()

    @override
    def update_metrics(self, batch: PairBatch) -> None:
        self.metrics.update(*self.compare(batch))

    @override
    def split_batch(self, batch: PairBatch) -> list[PairBatch]:
        n = len(batch["lengths"]) // 2  # row i is the chosen reply, row n + i the rejected reply
        rows = {name: cast(Tensor, values) for name, values in batch.items() if name not in STEP_KEYS}
        return [cast(PairBatch, {name: values[i::n] for name, values in rows.items()}) for i in range(n)]


def split_pairs(rows: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows into chosen and rejected rows, and drop padding pairs.

    Args:
        rows: Chosen rows followed by the rejected rows, of shape (2 B, ...).
        lengths: Number of tokens in each row, or 0 for padding pairs, int64 tensor of shape (2 B,).

    Returns:
        The chosen and the rejected rows, each of shape (n, ...).
    """
    chosen, rejected = rows.chunk(2)
    real = lengths.chunk(2)[0] > 0
    return chosen[real], rejected[real]
