"""The base of reward models and DPO: pairs of replies, of which one is preferred."""

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
    """Losses and rewards of pairs, (n,) floats, without padding pairs.

    Attributes:
        losses: The loss of each pair.
        chosen: The reward of the chosen reply.
        rejected: The reward of the rejected reply.
    """

    losses: Tensor
    chosen: Tensor
    rejected: Tensor


class PairwiseModule(GPTModule):
    """A GPT trained on pairs. A stage defines ``compare``; validation and test compute ``PreferenceMetrics``."""

    metrics: PreferenceMetrics | MetricCollection

    def compare(self, batch: PairBatch) -> PairComparison:
        """Losses and rewards of the pairs of a batch."""
        raise NotImplementedError

    @override
    def loss_and_count(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        losses = self.compare(batch).losses
        return losses.sum(), torch.tensor(len(losses), device=losses.device)

    @override
    def build_metrics(self) -> PreferenceMetrics | MetricCollection:
        if not self.data_info.has_pairs:
            name = self.data_info.name
            raise UserError(f"data: {name} has no pairs of replies; {type(self).__name__} needs Preferences")
        return PreferenceMetrics()

    @override
    def update_metrics(self, batch: PairBatch) -> None:
        self.metrics.update(*self.compare(batch))

    @override
    def split_batch(self, batch: PairBatch) -> list[PairBatch]:
        n = len(batch["lengths"]) // 2  # row i is the chosen reply, row n + i the rejected one
        rows = {name: cast(Tensor, values) for name, values in batch.items() if name not in STEP_KEYS}
        return [cast(PairBatch, {name: values[i::n] for name, values in rows.items()}) for i in range(n)]


def split_pairs(rows: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected rows, without padding pairs: (2 B, ...) rows and their (2 B,) tokens -> (n, ...) twice."""
    chosen, rejected = rows.chunk(2)
    real = lengths.chunk(2)[0] > 0
    return chosen[real], rejected[real]
