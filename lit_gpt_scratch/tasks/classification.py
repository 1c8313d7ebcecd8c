"""Text classification, with an output head that maps the pooled hidden states of a document to class logits."""

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
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
from lit_gpt_scratch.optim import Muon
from lit_gpt_scratch.tasks.gpt_module import GPTModule


class Classification(GPTModule):
    """GPT for text classification.

    The validation and test metrics are the loss, the accuracy, the macro-averaged F1 score and the macro-averaged area
    under the ROC curve (AUROC). The AUROC is averaged over the classes to which some but not all documents belong; it
    is NaN if there is no such class.

    Args:
        pooling: Pooling of the hidden states before the output head: ``last`` uses the hidden state of the last token;
            ``mean`` (the default) averages over all tokens, because informative words can occur anywhere in a text.
        class_weights: Class weights for the loss, keyed by class name; classes that are not listed have weight 1.
            ``balanced`` gives all classes the same total weight, regardless of their frequency. By default, all classes
            have weight 1.
        patience: Number of consecutive validation runs without a new lowest validation loss after which training
            stops. None disables early stopping. The argument has no effect if the trainer has an ``EarlyStopping``
            callback.
        label_smoothing: Weight of the uniform distribution in the training targets (https://arxiv.org/abs/1512.00567),
            which limits how confident the model becomes on few documents. Metrics are computed without smoothing.
        kwargs: Arguments of ``GPTModule``. The head is never tied to the embedding, regardless of
            ``gpt.tied_embeddings``. The default of ``ema_decay`` is 0.99, because training on few documents is noisy.

    Raises:
        UserError: ``pooling`` is unknown, or another argument is out of range.
    """

    default_epochs = 8
    argument_defaults: ClassVar = {"ema_decay": 0.99}
    optimizer_defaults: ClassVar = {"Muon": {"lr": 1e-3, "adamw_lr": 5e-3}, "AdamW": {"lr": 1e-3}}
    tests_best = True
    metrics: MetricCollection
    weights: Tensor
    """Weight of each class in the loss, float32 tensor of shape (n_classes,)."""
    confusion: Tensor
    """Confusion matrix of the last evaluation, int64 tensor of shape (n_classes, n_classes); rows are true classes, and
    columns are predicted classes."""

    def __init__(
        self,
        pooling: str = "mean",
        class_weights: Literal["balanced"] | dict[str, float] | None = None,
        patience: int | None = 3,
        label_smoothing: float = 0.1,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("optimizer", Muon(**self.optimizer_defaults["Muon"]))
        kwargs.setdefault("ema_decay", self.argument_defaults["ema_decay"])
        super().__init__(**kwargs)
        if patience is not None and patience < 1:
            raise UserError(f"model.patience is {patience}; it must be at least 1, or null to disable early stopping")
        if not 0.0 <= label_smoothing < 1.0:
            raise UserError(f"model.label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
        self.patience = patience
        self.label_smoothing = label_smoothing
        if pooling not in POOLINGS:
            raise UserError(f"model.pooling is {pooling}; it must be one of {', '.join(POOLINGS)}")
        for name, weight in class_weights.items() if isinstance(class_weights, dict) else ():
            if not 0.0 <= weight < float("inf"):
                raise UserError(
                    f"model.class_weights: the weight of {name} is {weight}; it must be finite and 0 or more"
                )
        self.pooling = pooling
        self.class_weights = class_weights

    @override
    def configure_callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
        if self.patience is None or any(isinstance(callback, EarlyStopping) for callback in callbacks):
            return []
        return [EarlyStopping("val/loss", patience=self.patience, check_on_train_epoch_end=False)]

    @property
    def class_names(self) -> list[str]:
        """Class names, in the order of the class indices.

        Raises:
            UserError: The data has no classes.
        """
        if self.data_info.class_names is None:
            raise UserError(f"data: {self.data_info.name} has no classes; Classification requires --data LabelledText")
        return self.data_info.class_names

    @property
    @override
    def output_head(self) -> ClassificationHead:
        return ClassificationHead(len(self.class_names), tuple(self.class_names))

    @cached_property
    @override
    def gpt(self) -> GPTConfig:
        return replace(super().gpt, tied_embeddings=False)

    def forward(self, input_ids: Tensor, lengths: Tensor, window_counts: Tensor | None = None) -> Tensor:
        """Compute the class logits of each document.

        Args:
            input_ids: Right-padded token ids, int64 tensor of shape (W, T).
            lengths: Number of tokens in each window, int64 tensor of shape (W,).
            window_counts: Number of windows per document, int64 tensor of shape (B,), or None if each document has one
                window.

        Returns:
            Logits, float32 tensor of shape (B, n_classes).
        """
        return self.net.forward_pooled(input_ids, lengths, self.pooling, window_counts)

    def _class_logits(self, batch: LabelledBatch) -> Tensor:
        logits: Tensor = self(batch["input_ids"], batch["lengths"], batch.get("window_counts"))
        return logits

    @override
    def split_batch(self, batch: LabelledBatch) -> list[Any]:
        if "window_counts" not in batch:
            return super().split_batch(batch)
        ends = batch["window_counts"].cumsum(0).tolist()
        return [
            {
                "input_ids": batch["input_ids"][start:end],
                "lengths": batch["lengths"][start:end],
                "window_counts": batch["window_counts"][row : row + 1],
                "labels": batch["labels"][row : row + 1],
            }
            for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        ]

    @override
    def loss_and_count(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        return self._loss_and_weight(self._class_logits(batch), batch["labels"], self.label_smoothing)

    def _loss_and_weight(self, logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(
            logits,
            labels,
            self.weights,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
        return loss, self.weights[labels[labels != IGNORE_INDEX]].sum()

    @override
    def step_count(self, batch: LabelledBatch) -> Tensor:
        return (self.weights * batch["step_class_counts"]).sum()

    @override
    def build_metrics(self) -> MetricCollection:
        self.register_buffer("weights", torch.tensor(self._resolve_class_weights()), persistent=False)
        n = len(self.class_names)
        return MetricCollection(
            {
                "loss": WeightedMeanLoss(),
                "accuracy": MulticlassAccuracy(n, average="micro", ignore_index=IGNORE_INDEX),
                "f1": MulticlassF1Score(n, ignore_index=IGNORE_INDEX),
                "auroc": MulticlassAUROC(n, average=None, ignore_index=IGNORE_INDEX),
                "confusion": MulticlassConfusionMatrix(n, ignore_index=IGNORE_INDEX),
            }
        )

    def _resolve_class_weights(self) -> list[float]:
        names, counts = self.class_names, self.data_info.class_counts
        if self.class_weights is None or counts is None:
            return [1.0] * len(names)
        if self.class_weights == "balanced":
            return [sum(counts) / len(names) / count for count in counts]
        if unknown := self.class_weights.keys() - set(names):
            raise UserError(f"model.class_weights: class {min(unknown)} does not exist; choose from {', '.join(names)}")
        weights = [self.class_weights.get(name, 1.0) for name in names]
        if not any(weights):
            raise UserError("model.class_weights: all weights are 0; at least one weight must be positive")
        return weights

    @override
    def update_metrics(self, batch: LabelledBatch) -> Tensor:
        logits, labels = self._class_logits(batch), batch["labels"]
        loss, weight = self._loss_and_weight(logits, labels)
        self.metrics.update(preds=logits.softmax(-1), target=labels, loss_sum=loss, weight_sum=weight)
        return F.cross_entropy(logits, labels, self.weights, ignore_index=IGNORE_INDEX, reduction="none")

    @override
    def compute_metrics(self) -> dict[str, Tensor]:
        values = super().compute_metrics()
        self.confusion, class_auroc = values.pop("confusion"), values.pop("auroc")
        return {**values, "auroc": mean_auroc(class_auroc, self.confusion.sum(1))}

    @override
    def checkpoint_metadata(self) -> CheckpointMetadata:
        return replace(
            super().checkpoint_metadata(),
            classes=self.class_names,
            pooling=self.pooling,
            window_size=self.data_info.block_size,
            max_windows=self.data_info.max_windows,
        )
