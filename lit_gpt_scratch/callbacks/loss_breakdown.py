"""Break down the validation loss by position, token frequency and passage, and plot the confusion matrix."""

from typing import Any, Final

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from torch import Tensor

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.callbacks import plotting
from lit_gpt_scratch.callbacks.metric_logging import log_metrics, tensorboard_writers
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.text.markdown import markdown_code_block

PASSAGE_LENGTH: Final = 32
"""Number of labels per passage."""
N_PASSAGES: Final = 8
"""Maximum number of highest-loss passages to show."""
MAX_COUNTED_WINDOWS: Final = 2048
"""Maximum number of training windows in which token frequencies are counted."""


class LossBreakdown(Callback):
    """Callback that breaks down the validation loss of a language model by position, token frequency and passage.

    - Loss by position in the window, as metrics and a plot. A model that uses its context has a lower loss at later
      positions.
    - Loss by token frequency in the training data, as metrics for frequency ranks 1 to 10, 11 to 100, and so on.
    - The passages of ``PASSAGE_LENGTH`` labels with the highest loss, as text.

    All of them are computed from the per-token losses of a validation run, across all ranks. The metric
    names are listed in ``metric_logging.py``.

    Args:
        enabled: Whether to break down the loss; if False, the callback does nothing.
        pictures: Whether to plot the loss by position and log the hardest passages, in addition to the metrics.
    """

    def __init__(self, enabled: bool, pictures: bool = True) -> None:
        self.enabled = enabled
        self.pictures = pictures
        self._bands: Tensor | None = None
        self._names: list[str] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the accumulators."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        available = getattr(pl_module, "returns_label_losses", False) and isinstance(data, BaseDataModule)
        self._active = self.enabled and available
        if not self._active:
            return
        device, T = pl_module.device, data.block_size
        if self._bands is None:
            bands, self._names = frequency_bands(data)
            self._bands = bands.to(device)
        self._positions = torch.zeros(2, T, device=device)  # sum of losses, number of labels
        self._frequencies = torch.zeros(2, len(self._names), device=device)
        self._hardest = torch.full((N_PASSAGES,), float("-inf"), device=device)
        # (N_PASSAGES, 2, PASSAGE_LENGTH): preceding input ids, and labels
        self._passages = torch.zeros(N_PASSAGES, 2, PASSAGE_LENGTH, dtype=torch.int64, device=device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Accumulate the losses of a batch, without synchronizing the device."""
        if not self._active or outputs is None:
            return
        assert self._bands is not None
        losses, labels = outputs["label_losses"].float(), batch["labels"]  # (B, T)
        counted = (labels != IGNORE_INDEX).float()
        self._positions += torch.stack((losses.sum(0), counted.sum(0)))
        bands = self._bands[labels.clamp(min=0)].flatten()  # (B * T,)
        inside = torch.arange(len(self._names), device=bands.device)[:, None] == bands  # (bands, B * T)
        # A matmul is avoided, because some devices compute it at lower precision (TF32).
        self._frequencies += (torch.stack((losses * counted, counted)).flatten(1)[:, None] * inside).sum(-1)
        if self.pictures:
            self._keep_hardest(batch["input_ids"], labels, losses, counted)

    def _keep_hardest(self, ids: Tensor, labels: Tensor, losses: Tensor, counted: Tensor) -> None:
        B, T = labels.shape
        n = T // PASSAGE_LENGTH
        if not n:
            return
        each, full = (x[:, : n * PASSAGE_LENGTH].reshape(B * n, PASSAGE_LENGTH).sum(-1) for x in (losses, counted))
        # Only passages in which every position has a label are considered.
        hardness = torch.where(full == PASSAGE_LENGTH, each / PASSAGE_LENGTH, float("-inf"))
        found = torch.cat((self._hardest, hardness))
        # The context of a label ends with the input id at its own position.
        nothing = torch.full_like(ids[:, : PASSAGE_LENGTH - 1], -1)
        before = torch.cat((nothing, ids), 1)[:, : n * PASSAGE_LENGTH].reshape(B * n, PASSAGE_LENGTH)
        after = labels[:, : n * PASSAGE_LENGTH].reshape(B * n, PASSAGE_LENGTH)
        passages = torch.cat((self._passages, torch.stack((before, after), 1)))
        self._hardest, best = found.topk(N_PASSAGES)
        self._passages = passages[best]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the metrics, the plot and the hardest passages."""
        if not self._active or trainer.sanity_checking:
            return
        data, step = trainer.datamodule, trainer.global_step - 1  # type: ignore[attr-defined]  # it is set late
        sums = [trainer.strategy.reduce(x, reduce_op="sum") for x in (self._positions, self._frequencies)]
        (positions, n_positions), (frequencies, n_frequencies) = (x.cpu().double().numpy() for x in sums)
        figures = {}
        for begin, end in position_bands(data.block_size):
            if number := n_positions[begin : end + 1].sum():
                figures[f"loss_by_position/{begin}-{end}"] = float(positions[begin : end + 1].sum() / number)
        for name, total, number in zip(self._names, frequencies, n_frequencies, strict=True):
            if number:
                figures[f"loss_by_frequency/{name}"] = float(total / number)
        log_metrics(trainer, figures, step)
        if not self.pictures:
            return
        passages = self._gather_passages()
        for board in tensorboard_writers(trainer):
            with np.errstate(invalid="ignore", divide="ignore"):
                curve = positions / n_positions
            picture = plotting.line_plot(curve, "validation loss, mean over windows", "position in the window")
            board.add_image("views/loss_by_position", picture, step, dataformats="HWC")
            board.add_text("views/hardest_passages", self._format_passages(data, passages), step)

    def _gather_passages(self) -> list[tuple[float, list[list[int]]]]:
        """Gather the hardest passages across all ranks, without duplicates, hardest first."""
        own = list(zip(self._hardest.tolist(), self._passages.tolist(), strict=True))
        everyone = [own]
        if dist.is_available() and dist.is_initialized():
            everyone = [own] * dist.get_world_size()
            dist.all_gather_object(everyone, own)
        unique = {str(passage): (loss, passage) for part in everyone for loss, passage in part if loss > float("-inf")}
        return sorted(unique.values(), reverse=True)[:N_PASSAGES]

    def _format_passages(self, data: BaseDataModule, passages: list[tuple[float, list[list[int]]]]) -> str:
        parts = [f"The {PASSAGE_LENGTH}-token passages with the highest loss, marked by ⟦ ⟧, after their context."]
        for loss, (before, after) in passages:
            read = data.tokenizer.decode([id_ for id_ in before if id_ >= 0])
            passage = markdown_code_block(f"{read}⟦{data.tokenizer.decode(after)}⟧")
            parts.append(f"**{loss:.2f} nats per token**\n\n{passage}")
        return "\n\n".join(parts)


def position_bands(block_size: int) -> list[tuple[int, int]]:
    """Return the first and last position of each band; the bands end after 1, 4, 16, ... positions."""
    ends = [1]
    while ends[-1] < block_size:
        ends.append(ends[-1] * 4)
    begins = [0, *ends[:-1]]
    return [(begin, min(end, block_size) - 1) for begin, end in zip(begins, ends, strict=True)]


def frequency_bands(data: BaseDataModule) -> tuple[Tensor, list[str]]:
    """Group tokens by their frequency as training labels: the ten most frequent, the next ninety, and so on.

    Returns:
        Band index of each token, int64 tensor of shape (vocab_size,), and the names of the bands. Tokens that do not
        occur are ranked last, ordered by id.
    """
    n = min(len(data.train_dataset), MAX_COUNTED_WINDOWS)
    spread = np.linspace(0, len(data.train_dataset) - 1, n).astype(int).tolist()
    labels = data.train_dataset.make_batch(spread)["labels"]
    counts = torch.bincount(labels[labels != IGNORE_INDEX], minlength=data.vocab_size)
    ranks = torch.empty(data.vocab_size, dtype=torch.int64)
    ranks[counts.argsort(descending=True, stable=True)] = torch.arange(data.vocab_size)
    ends = [10]
    while ends[-1] < data.vocab_size:
        ends.append(ends[-1] * 10)
    bands = torch.bucketize(ranks, torch.tensor(ends), right=True)
    begins = [1, *(end + 1 for end in ends[:-1])]
    return bands, [f"{begin}-{min(end, data.vocab_size)}" for begin, end in zip(begins, ends, strict=True)]


class ConfusionMatrixPlot(Callback):
    """Callback that plots the confusion matrix in TensorBoard's image tab after each validation or test run."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plot the confusion matrix of the validation data."""
        if not trainer.sanity_checking:
            self._plot(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Plot the confusion matrix of the test data."""
        self._plot(trainer, pl_module, "test")

    def _plot(self, trainer: L.Trainer, pl_module: L.LightningModule, split: str) -> None:
        counts = getattr(pl_module, "confusion", None)
        if not trainer.is_global_zero or not isinstance(counts, Tensor):
            return
        names: list[str] = pl_module.class_names  # type: ignore[assignment]  # tasks with a confusion matrix have it
        picture = plot_confusion_matrix(counts.cpu().numpy(), names)
        for board in tensorboard_writers(trainer):  # step at which Lightning logs validation metrics
            board.add_image(f"{split}/confusion", picture, trainer.global_step - 1, dataformats="HWC")


def plot_confusion_matrix(counts: NDArray[np.int64], names: list[str]) -> NDArray[np.uint8]:
    """Plot a confusion matrix: rows are true classes, columns are predicted classes, colors are fractions of the row.

    Args:
        counts: Number of examples whose true class is the row and whose predicted class is the column, of shape (n, n).
        names: Names of the n classes.

    Returns:
        RGB image as a (height, width, 3) uint8 array.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    texts = [[f"{count:,}" for count in row] for row in counts.tolist()]
    title = "Confusion matrix: number of examples, colored by fraction of the true class"
    return plotting.heat_map(shares, texts, names, names, title, "true class", "predicted class")
