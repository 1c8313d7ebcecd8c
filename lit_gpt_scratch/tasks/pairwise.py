"""What reward models and DPO have in common: pairs of replies, and how well rewards tell them apart."""

from typing import NamedTuple, cast

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from typing_extensions import override

from lit_gpt_scratch.batch_types import PairBatch
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.metrics import PreferenceMetrics
from lit_gpt_scratch.tasks.gpt_module import GPTModule


class PairComparison(NamedTuple):
    """Pairs that were compared: (n,) floats, and none of what only fills the batch up.

    Attributes:
        losses: What is lost on each.
        chosen: The reward of the preferred reply.
        rejected: That of the other.
    """

    losses: Tensor
    chosen: Tensor
    rejected: Tensor


class PairwiseModule(GPTModule):
    """A GPT that learns from pairs. Validation and test measure what ``PreferenceMetrics`` does.

    Subclasses say what they make of a batch (``compare``).
    """

    metrics: PreferenceMetrics | MetricCollection

    def compare(self, batch: PairBatch) -> PairComparison:
        """Losses and rewards of the pairs of a batch."""
        raise NotImplementedError

    @override
    def build_metrics(self) -> PreferenceMetrics | MetricCollection:
        if not hasattr(self.data, "pairs"):
            name = type(self.data).__name__
            raise UserError(f"data: {name} has no pairs of replies; {type(self).__name__} needs Preferences")
        return PreferenceMetrics()

    @override
    def positions(self, batch: PairBatch) -> int:
        return len(batch["lengths"]) // 2

    @override
    def split_batch(self, batch: PairBatch) -> list[PairBatch]:
        n = self.positions(batch)  # of 2 n rows each n-th: a reply and the other
        pairs = ({name: cast(Tensor, rows)[place::n] for name, rows in batch.items()} for place in range(n))
        return [cast(PairBatch, pair) for pair in pairs]

    @override
    def loss_and_count(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        losses = self.compare(batch).losses
        return losses.sum(), torch.tensor(len(losses), device=losses.device)

    @override
    def update_metrics(self, batch: PairBatch) -> None:
        self.metrics.update(*self.compare(batch))


def split_pairs(rows: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Of the preferred and of the other replies: (2 B, ...) rows and their (2 B,) tokens -> (n, ...) twice."""
    chosen, rejected = rows.chunk(2)
    there = lengths.chunk(2)[0] > 0
    return chosen[there], rejected[there]
