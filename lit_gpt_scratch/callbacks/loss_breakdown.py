"""Where validation loses: at which places of a window, on which tokens, in which passages."""

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
from lit_gpt_scratch.tasks import Classification, LanguageModel

PASSAGE_LENGTH: Final = 32
"""Labels of a passage."""
N_PASSAGES: Final = 8
"""Passages that are shown."""
MAX_COUNTED_WINDOWS: Final = 2048
"""Training windows in which tokens are counted, at most."""


class LossBreakdown(Callback):
    """Tell apart what the validation loss is the mean of, for language models.

    By place in the window, as figures and as a picture: a model that uses its context is better at late places. By how
    frequent a token is in training, in decades of ranks. And, as text, the
    hardest passages of ``PASSAGE_LENGTH`` labels.
    All comes from the losses that were measured anyway, and all ranks' count. For the names see ``measured``.

    Args:
        enabled: Whether to do anything.
        pictures: Whether to draw the losses by place, and to write the hardest passages, beside the figures.
    """

    def __init__(self, enabled: bool, pictures: bool = True) -> None:
        self.enabled = enabled
        self.pictures = pictures
        self._bands: Tensor | None = None
        self._names: list[str] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        self._active = self.enabled and isinstance(pl_module, LanguageModel) and isinstance(data, BaseDataModule)
        if not self._active:
            return
        device, T = pl_module.device, data.block_size
        if self._bands is None:
            bands, self._names = frequency_bands(data)
            self._bands = bands.to(device)
        self._places = torch.zeros(2, T, device=device)  # sums of losses, and how many
        self._frequencies = torch.zeros(2, len(self._names), device=device)
        self._hardest = torch.full((N_PASSAGES,), float("-inf"), device=device)
        self._passages = torch.zeros(
            N_PASSAGES, 2, PASSAGE_LENGTH, dtype=torch.int64, device=device
        )  # what came before, and it

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch; nothing waits for the device."""
        if not self._active or outputs is None:
            return
        assert self._bands is not None
        lost, labels = outputs["token_losses"].float(), batch["labels"]  # (B, T)
        counted = (labels != IGNORE_INDEX).float()
        self._places += torch.stack((lost.sum(0), counted.sum(0)))
        bands = self._bands[labels.clamp(min=0)].flatten()  # (B * T,)
        inside = torch.arange(len(self._names), device=bands.device)[:, None] == bands  # (bands, B * T)
        # No product of matrices: on some devices those round to fewer bits.
        self._frequencies += (torch.stack((lost * counted, counted)).flatten(1)[:, None] * inside).sum(-1)
        if self.pictures:
            self._keep_hardest(batch["input_ids"], labels, lost, counted)

    def _keep_hardest(self, ids: Tensor, labels: Tensor, lost: Tensor, counted: Tensor) -> None:
        B, T = labels.shape
        n = T // PASSAGE_LENGTH
        if not n:
            return
        each, full = (x[:, : n * PASSAGE_LENGTH].reshape(B * n, PASSAGE_LENGTH).sum(-1) for x in (lost, counted))
        hard = torch.where(
            full == PASSAGE_LENGTH, each / PASSAGE_LENGTH, float("-inf")
        )  # only passages that are labelled throughout
        found = torch.cat((self._hardest, hard))
        nothing = torch.full_like(
            ids[:, : PASSAGE_LENGTH - 1], -1
        )  # the last of what came before a label is its own input
        before = torch.cat((nothing, ids), 1)[:, : n * PASSAGE_LENGTH].reshape(B * n, PASSAGE_LENGTH)
        after = labels[:, : n * PASSAGE_LENGTH].reshape(B * n, PASSAGE_LENGTH)
        passages = torch.cat((self._passages, torch.stack((before, after), 1)))
        self._hardest, best = found.topk(N_PASSAGES)
        self._passages = passages[best]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log, draw and write."""
        if not self._active or trainer.sanity_checking:
            return
        data, step = trainer.datamodule, trainer.global_step - 1  # type: ignore[attr-defined]  # it is set late
        sums = [trainer.strategy.reduce(x, reduce_op="sum") for x in (self._places, self._frequencies)]
        (places, n_places), (frequencies, n_frequencies) = (x.cpu().double().numpy() for x in sums)
        figures = {}
        for begin, end in position_bands(data.block_size):
            if number := n_places[begin : end + 1].sum():
                figures[f"loss_by_position/{begin}-{end}"] = float(places[begin : end + 1].sum() / number)
        for name, lost, number in zip(self._names, frequencies, n_frequencies, strict=True):
            if number:
                figures[f"loss_by_frequency/{name}"] = float(lost / number)
        log_metrics(trainer, figures, step)
        if not self.pictures:
            return
        passages = self._gathered()
        for board in tensorboard_writers(trainer):
            with np.errstate(invalid="ignore", divide="ignore"):
                curve = places / n_places
            picture = plotting.line(curve, "loss, mean over windows", "place in the window")
            board.add_image("views/loss_by_position", picture, step, dataformats="HWC")
            board.add_text("views/hardest_passages", self._told(data, passages), step)

    def _gathered(self) -> list[tuple[float, list[list[int]]]]:
        """The hardest passages of all ranks, each once, the hardest first."""
        own = list(zip(self._hardest.tolist(), self._passages.tolist(), strict=True))
        everyone = [own]
        if dist.is_available() and dist.is_initialized():
            everyone = [own] * dist.get_world_size()
            dist.all_gather_object(everyone, own)
        there = {str(passage): (lost, passage) for part in everyone for lost, passage in part if lost > float("-inf")}
        return sorted(there.values(), reverse=True)[:N_PASSAGES]

    def _told(self, data: BaseDataModule, passages: list[tuple[float, list[list[int]]]]) -> str:
        parts = [f"The {PASSAGE_LENGTH} tokens in a row that were hardest to predict, behind what came before them."]
        for lost, (before, after) in passages:
            read = data.tokenizer.decode([id_ for id_ in before if id_ >= 0])
            lines = f"{read}⟦{data.tokenizer.decode(after)}⟧".splitlines()
            parts.append(f"**{lost:.2f} nats a token**\n\n" + "\n".join(f"    {line}" for line in lines))
        return "\n\n".join(parts)


def position_bands(block_size: int) -> list[tuple[int, int]]:
    """Places of a window in bands that grow by four: first and last place of each."""
    ends = [1]
    while ends[-1] < block_size:
        ends.append(ends[-1] * 4)
    begins = [0, *ends[:-1]]
    return [(begin, min(end, block_size) - 1) for begin, end in zip(begins, ends, strict=True)]


def frequency_bands(data: BaseDataModule) -> tuple[Tensor, list[str]]:
    """Tokens in bands by how frequent they are as labels of the training: the ten most frequent, the next ninety, ...

    Returns:
        (vocab_size,) int64, the band of each token; and the bands' names. Tokens that were not counted are the rarest,
        in the order of their ids.
    """
    n = min(len(data.train_dataset), MAX_COUNTED_WINDOWS)
    spread = np.linspace(0, len(data.train_dataset) - 1, n).astype(int).tolist()
    labels = data.train_dataset.__getitems__(spread)["labels"]
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
    """The confusion matrix after each validation, and of the test, into TensorBoard's tab of images.

    A row is a class, a column what its texts were taken for; a cell says how many, and is as dark as its share of the
    row.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of the validation."""
        if not trainer.sanity_checking:
            self._show(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of the test."""
        self._show(trainer, pl_module, "test")

    def _show(self, trainer: L.Trainer, pl_module: L.LightningModule, side: str) -> None:
        if not trainer.is_global_zero or not isinstance(pl_module, Classification):
            return
        picture = plot_confusion_matrix(pl_module.confusion.cpu().numpy(), pl_module.labelled.class_names)
        for board in tensorboard_writers(trainer):  # the step as Lightning numbers a validation
            board.add_image(f"{side}/confusion", picture, trainer.global_step - 1, dataformats="HWC")


def plot_confusion_matrix(counts: NDArray[np.int64], names: list[str]) -> NDArray[np.uint8]:
    """The picture of a confusion matrix.

    Args:
        counts: (n, n): of the texts of the class of a row, how many were taken for that of a column.
        names: (n,) of the classes.

    Returns:
        (height, width, 3) uint8.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return plotting.table(shares, [[f"{count:,}" for count in row] for row in counts.tolist()], names, names)
