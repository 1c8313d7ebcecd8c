"""Evaluate classifiers: accuracy, F1, AUROC and the confusion matrix."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.classification import multiclass_auroc, multiclass_confusion_matrix, multiclass_f1_score
from tqdm import tqdm

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.evaluation import benchmark_rows
from lit_gpt_scratch.evaluation.intervals import Measurements, Metrics, PartIndices
from lit_gpt_scratch.evaluation.loglikelihood import TOKENS_PER_BATCH, batch_by_length
from lit_gpt_scratch.losses.metrics import mean_auroc
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.document import TableRow, get_label
from lit_gpt_scratch.text.tokenizer import Tokenizer
from lit_gpt_scratch.text.windows import Windows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassificationExample:
    """Text to classify, with its class label.

    Attributes:
        where: Source and line of the row, used in error messages.
        text: Text to classify.
        label: Index of the class.
    """

    where: str
    text: str
    label: int

    @classmethod
    def from_row(
        cls, row: TableRow, text_column: str, label_column: str, classes: Sequence[str]
    ) -> "ClassificationExample":
        """Read the text and the class name from two columns of a benchmark row.

        Raises:
            UserError: A column is missing, or the label is not one of the classes.
        """
        if label_column not in row.fields:
            columns = ", ".join(row.fields)
            raise UserError(
                f"{row.where} has no label column '{label_column}'; set --data.label_column to an existing column "
                f"({columns})"
            )
        try:
            label = get_label(row.fields, label_column)
        except UserError as error:
            raise UserError(f"{row.where}: {error}; the row has columns {', '.join(row.fields)}") from error
        if label not in classes:
            raise UserError(
                f"{row.where}: the label {label!r} is not one of the model's classes ({', '.join(classes)}); "
                "correct the label or remove the row"
            )
        return cls(row.where, benchmark_rows.get_text(row, text_column), classes.index(label))


@torch.inference_mode()
def classify(
    model: GPT, tokenizer: Tokenizer, texts: Sequence[str], pooling: str = "last", windows: Windows | None = None
) -> NDArray[np.float64]:
    """Compute the class probabilities of each text.

    Args:
        model: Model with a classification head, in evaluation mode.
        tokenizer: The model's tokenizer.
        texts: N strings. Each is preceded by the start-of-text token, like a document.
        pooling: Method for pooling the hidden states before the head; see ``model.output_heads.POOLINGS``.
        windows: Windows into which texts are split; None uses one window of the model's context length.

    Returns:
        Probabilities, of shape (N, n_classes).
    """
    windows = windows or Windows(model.block_size)
    encoded = [tokenizer.encode(text) for text in texts]
    if n_long := sum(windows.truncates(len(ids)) for ids in encoded):
        limit = f"{windows.most} windows of {windows.size} tokens" if windows.most > 1 else f"{windows.size} tokens"
        log.warning("%d texts are truncated to their first %s", n_long, limit)
    split = [windows.split(ids, tokenizer.start_of_text) for ids in encoded]
    lengths = [len(parts) * max(map(len, parts)) for parts in split]
    device = next(model.parameters()).device
    found: list[Any] = [None] * len(texts)
    with tqdm(total=len(texts), desc="classifying", unit="", delay=2, leave=False, disable=None) as bar:
        for indices in batch_by_length(lengths, [length / TOKENS_PER_BATCH for length in lengths]):
            batch = [torch.tensor(part) for index in indices for part in split[index]]
            inputs = pad_sequence(batch, batch_first=True).to(device)  # (W, T)
            sizes = torch.tensor([len(row) for row in batch], device=device)  # (W,)
            counts = torch.tensor([len(split[index]) for index in indices], device=device)  # (B,)
            logits = model.forward_pooled(inputs, sizes, pooling, counts)  # (B, n_classes)
            for index, row in zip(indices, logits.softmax(-1).tolist(), strict=True):
                found[index] = row
            bar.update(len(indices))
    return np.array(found)


def evaluate_classification(
    model: GPT,
    tokenizer: Tokenizer,
    examples: Sequence[ClassificationExample],
    classes: Sequence[str],
    pooling: str = "last",
    windows: Windows | None = None,
) -> Measurements:
    """Predict the most probable class of each text, and compare it with the label.

    Args:
        model: Model with a classification head, in evaluation mode.
        tokenizer: The model's tokenizer.
        examples: Texts with class labels.
        classes: Class names.
        pooling: See ``classify``.
        windows: See ``classify``.

    Returns:
        ``accuracy``; ``f1``, the mean F1 score over the classes that occur or are predicted; ``auroc``, the mean area
        under the ROC curve over the classes that have both positive and negative examples, or NaN if there is no such
        class; and ``confusion``, the number of texts for each pair of true and predicted class.
    """
    texts = [example.text for example in examples]
    probabilities = torch.tensor(classify(model, tokenizer, texts, pooling, windows))  # (N, n)
    predicted = probabilities.argmax(-1)  # (N,)
    true = torch.tensor([example.label for example in examples])  # (N,)
    n = len(classes)

    def metrics(indices: PartIndices) -> Metrics:
        subset = torch.from_numpy(indices)
        counts = true[subset].bincount(minlength=n)  # (n,)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics warns about classes that mean_auroc ignores
            areas = multiclass_auroc(probabilities[subset], true[subset], n, average=None)  # (n,)
        return {
            "accuracy": (predicted[subset] == true[subset]).double().mean().item(),
            "f1": multiclass_f1_score(predicted[subset], true[subset], n, average="macro").item(),
            "auroc": mean_auroc(areas, counts).item(),
        }

    def extra(indices: PartIndices) -> dict[str, Any]:
        subset = torch.from_numpy(indices)
        counts = multiclass_confusion_matrix(predicted[subset], true[subset], n).tolist()
        named = (dict(zip(classes, row, strict=True)) for row in counts)
        return {"confusion": dict(zip(classes, named, strict=True))}

    return Measurements.from_rows(
        len(examples), metrics, frozenset({"accuracy"}), extra, {"f1": (0.0, 1.0), "auroc": (0.0, 1.0)}
    )
