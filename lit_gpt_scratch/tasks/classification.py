"""Telling classes of texts apart: a head with a row a class, which reads a text once it has been seen whole."""

from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from typing_extensions import override

from lit_gpt_scratch.batch_types import IGNORE_INDEX, LabelledBatch
from lit_gpt_scratch.checkpoint.metadata import CheckpointMetadata
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.losses.metrics import WeightedMeanLoss, mean_auroc
from lit_gpt_scratch.model import GPTConfig
from lit_gpt_scratch.model.output_heads import POOLINGS, ClassificationHead
from lit_gpt_scratch.tasks.gpt_module import GPTModule, TokenData


class LabelledData(TokenData, Protocol):
    """What the task reads from the data module, once that is set up."""

    class_names: list[str]
    class_counts: list[int]


class Classification(GPTModule):
    """A GPT that learns which class a text is of.

    Validation and test measure the loss and the accuracy; and as means over classes F1 and the area under the ROC
    curve, the latter of the classes that some texts are of, and others are not; of none it is NaN.

    Args:
        pooling: What the head reads of a text: the stream at its ``last`` token, or the ``mean`` over all.
        class_weights: What a label of each class counts in the loss, by the class's name; or ``balanced``, so that
            every class counts alike however rare it is. By default every label counts alike.
        kwargs: As for ``GPTModule``. The head is not tied to the embedding, whatever ``gpt`` says.

    Raises:
        UserError: There is no such pooling.
    """

    metrics: MetricCollection
    weights: Tensor
    confusion: Tensor
    """(n, n) int64: how many texts of the class of each row were taken for that of each column, when last measured."""

    def __init__(
        self,
        pooling: str = "last",
        class_weights: Literal["balanced"] | dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if pooling not in POOLINGS:
            raise UserError(f"model.pooling is {pooling}; it must be one of {', '.join(POOLINGS)}")
        for name, weight in class_weights.items() if isinstance(class_weights, dict) else ():
            if not 0.0 <= weight < float("inf"):
                raise UserError(f"model.class_weights: that of {name} is {weight}; it must be 0 or more")
        self.pooling = pooling
        self.class_weights = class_weights

    @property
    def labelled(self) -> LabelledData:
        """The data module, as one with classes.

        Raises:
            UserError: It has none.
        """
        if not hasattr(self.data, "class_names"):
            raise UserError(f"data: {type(self.data).__name__} has no classes; Classification needs LabelledText")
        return cast(LabelledData, self.data)

    @property
    @override
    def output_head(self) -> ClassificationHead:
        names = self.labelled.class_names
        return ClassificationHead(len(names), tuple(names))

    @cached_property
    @override
    def gpt(self) -> GPTConfig:
        return replace(super().gpt, tied_embeddings=False)

    @override
    def build_metrics(self) -> MetricCollection:
        names, counts = self.labelled.class_names, self.labelled.class_counts
        n, weights = len(names), [1.0] * len(names)
        if self.class_weights == "balanced":
            weights = [sum(counts) / n / count for count in counts]
        elif self.class_weights is not None:
            if unknown := self.class_weights.keys() - set(names):
                raise UserError(f"model.class_weights: there is no class {min(unknown)}; there is {', '.join(names)}")
            weights = [self.class_weights.get(name, 1.0) for name in names]
            if not any(weights):
                raise UserError("model.class_weights: all are 0; nothing would be learned")
        self.register_buffer("weights", torch.tensor(weights), persistent=False)
        measures = {
            "accuracy": MulticlassAccuracy(n, average="micro", ignore_index=IGNORE_INDEX),
            "f1": MulticlassF1Score(n, ignore_index=IGNORE_INDEX),
            "auroc": MulticlassAUROC(n, average=None, ignore_index=IGNORE_INDEX),
            "confusion": MulticlassConfusionMatrix(n, ignore_index=IGNORE_INDEX),
        }
        return MetricCollection({"loss": WeightedMeanLoss(), **measures})

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Logits of the classes: (B, T) int64 ids, filled up behind each text's (B,) tokens -> (B, n) float32."""
        return self.net.forward_pooled(input_ids, lengths, self.pooling)

    @override
    def loss_and_count(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        return self._losses(self(batch["input_ids"], batch["lengths"]), batch["labels"])

    def _losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        lost = F.cross_entropy(logits, labels, self.weights, ignore_index=IGNORE_INDEX, reduction="sum")
        return lost, self.weights[labels[labels != IGNORE_INDEX]].sum()

    @override
    def update_metrics(self, batch: LabelledBatch) -> Tensor:
        logits, labels = self(batch["input_ids"], batch["lengths"]), batch["labels"]
        lost, counted = self._losses(logits, labels)
        self.metrics.update(preds=logits.softmax(-1), target=labels, lost=lost, counted=counted)
        return F.cross_entropy(logits, labels, self.weights, ignore_index=IGNORE_INDEX, reduction="none")

    @property
    @override
    def uneven(self) -> bool:
        return self.class_weights is not None or super().uneven

    @override
    def compute_metrics(self) -> dict[str, Tensor]:
        found = super().compute_metrics()
        self.confusion, each = found.pop("confusion"), found.pop("auroc")
        return {**found, "auroc": mean_auroc(each, self.confusion.sum(1))}

    @override
    def checkpoint_metadata(self) -> CheckpointMetadata:
        return replace(super().checkpoint_metadata(), classes=self.labelled.class_names, pooling=self.pooling)
