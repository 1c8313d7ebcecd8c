"""What class a model gives a text, and how often it is the right one."""

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
from lit_gpt_scratch.evaluation import jsonl
from lit_gpt_scratch.evaluation.intervals import Measurements, Metrics, PartIndices
from lit_gpt_scratch.evaluation.loglikelihood import TOKENS_PER_BATCH, batch_by_length
from lit_gpt_scratch.losses.metrics import mean_auroc
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.text.document import TableRow, get_label
from lit_gpt_scratch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabeledText:
    """A text and its class.

    Attributes:
        where: Its place.
        text: The text.
        label: Its class's number.
    """

    where: str
    text: str
    label: int

    @classmethod
    def from_row(cls, row: TableRow, text_column: str, label_column: str, classes: Sequence[str]) -> "LabeledText":
        """Of two columns; a label is the name of a class.

        Raises:
            UserError: One is missing, or the label is not among the classes.
        """
        if label_column not in row.fields:
            there = ", ".join(row.fields)
            raise UserError(
                f"{row.where}: no label: no column '{label_column}' but {there}; name one: --data.label_column"
            )
        try:
            label = get_label(row.fields, label_column)
        except UserError as error:
            raise UserError(f"{row.where}: {error}; its columns are {', '.join(row.fields)}") from error
        if label not in classes:
            raise UserError(f"{row.where}: the label {label!r} is not one of the model's classes, {', '.join(classes)}")
        return cls(row.where, jsonl.get_text(row, text_column), classes.index(label))


@torch.inference_mode()
def classify(model: GPT, tokenizer: Tokenizer, texts: Sequence[str], pooling: str = "last") -> NDArray[np.float64]:
    """The probability of each class, (N, n).

    Args:
        model: In evaluation mode; reads classes.
        tokenizer: The model's.
        texts: Each is read behind the start of text, as a document.
        pooling: What the head reads of a text; see ``model.heads``.
    """
    ids = [[tokenizer.start_of_text, *tokenizer.encode(text)] for text in texts]
    if n_long := sum(len(row) > model.block_size for row in ids):
        log.warning(
            "of %d texts only the first %d tokens are read: the context holds no more", n_long, model.block_size
        )
        ids = [row[: model.block_size] for row in ids]
    lengths = [len(row) for row in ids]
    device = next(model.parameters()).device
    found: list[Any] = [None] * len(ids)
    with tqdm(total=len(ids), desc="classifying", unit="", delay=2, leave=False, disable=None) as bar:
        for places in batch_by_length(lengths, [length / TOKENS_PER_BATCH for length in lengths]):
            batch = [torch.tensor(ids[place]) for place in places]
            inputs = pad_sequence(batch, batch_first=True).to(device)  # (B, T)
            counts = torch.tensor([len(row) for row in batch], device=device)  # (B,)
            logits = model.forward_pooled(inputs, counts, pooling)  # (B, n_classes)
            for place, row in zip(places, logits.softmax(-1).tolist(), strict=True):
                found[place] = row
            bar.update(len(places))
    return np.array(found)


def evaluate_classification(
    model: GPT, tokenizer: Tokenizer, labelled: Sequence[LabeledText], classes: Sequence[str], pooling: str = "last"
) -> Measurements:
    """Take the likeliest class of each text.

    Returns:
        ``accuracy``; ``f1``, the mean over classes of their F1, those that neither occur nor are given left out;
        ``auroc``, the mean over classes of the area under the ROC curve, those left out that no text is of, or every
        one, and NaN if none is left; and ``confusion``, by true class how many are given which.
    """
    chances = torch.tensor(classify(model, tokenizer, [each.text for each in labelled], pooling))  # (N, n)
    given = chances.argmax(-1)  # (N,)
    true = torch.tensor([each.label for each in labelled])  # (N,)
    n = len(classes)

    def metrics(places: PartIndices) -> Metrics:
        here = torch.from_numpy(places)
        texts = true[here].bincount(minlength=n)  # (n,)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that are left out of the mean
            areas = multiclass_auroc(chances[here], true[here], n, average=None)  # (n,)
        return {
            "accuracy": (given[here] == true[here]).double().mean().item(),
            "f1": multiclass_f1_score(given[here], true[here], n, average="macro").item(),
            "auroc": mean_auroc(areas, texts).item(),
        }

    def extra(places: PartIndices) -> dict[str, Any]:
        here = torch.from_numpy(places)
        counts = multiclass_confusion_matrix(given[here], true[here], n).tolist()
        named = (dict(zip(classes, row, strict=True)) for row in counts)
        return {"confusion": dict(zip(classes, named, strict=True))}

    return Measurements.from_rows(
        len(labelled), metrics, frozenset({"accuracy"}), extra, {"f1": (0.0, 1.0), "auroc": (0.0, 1.0)}
    )
