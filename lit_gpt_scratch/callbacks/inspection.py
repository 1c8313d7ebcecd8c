"""What a network does inside while it reads a fixed text."""

from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_gpt_scratch.callbacks.dynamics import due
from lit_gpt_scratch.callbacks.measured import record
from lit_gpt_scratch.callbacks.views import Views
from lit_gpt_scratch.data.ordered import OrderedData
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.hardware.parallel import every_head
from lit_gpt_scratch.model.inspection import Looks, Observation, Seen, answers, dead, looks, observe
from lit_gpt_scratch.tasks.gpt_task import GPTTask

TOKENS = 256
"""Tokens of the fixed text, at most: attention weights grow with the square of a window."""
SHOWN = 24
"""Tokens whose weights are drawn."""


class Layer(NamedTuple):
    """What is kept of a block.

    Attributes:
        looks: How its heads look back; None if attention of one's own does not tell.
        answers: (ffn_dim,) float32, the largest magnitude of each feed-forward unit.
        norm: Root mean square of the stream behind it: a float32 scalar.
        map: (n_head, t, t), who of the first tokens looks at whom, if pictures are drawn.
        stream: (B, T, n_embd), if pictures are drawn.
        hidden: (B, T, ffn_dim), the same.
    """

    looks: Looks | None
    answers: Tensor
    norm: Tensor
    map: Tensor | None = None
    stream: Tensor | None = None
    hidden: Tensor | None = None


class Inspection(Callback):
    """Let the network read the first validation windows, look at what it does inside, log it, and draw it.

    Figures are logged every so many steps, of the weights as they are trained; their names are in ``measured``.
    Pictures, tables and histograms are drawn after each validation, of the weights that were validated, and never
    within a step (``views``). The network reads uncompiled and in evaluation mode, draws no random number, and is left
    as it was. All ranks read, so that every strategy can; the first one draws.

    Args:
        every_n_steps: Optimizer steps from one look to the next, for all that ``inspect`` measures; the first step is
            looked at, too. 0 for never, and then nothing is drawn either.
        pictures: Draw after each validation: attention, the logit lens, losses by place, the hardest passages,
            histograms; and at the end the embedding for TensorBoard's projector.
        prompts: Texts that a language model continues after each validation; by default an empty one, which begins a
            document, and the beginnings of two that it is validated on, or conversations. An empty list for none.

    Raises:
        UserError: A number is out of its range.
    """

    def __init__(self, every_n_steps: int = 100, pictures: bool = True, prompts: list[str] | None = None) -> None:
        if every_n_steps < 0:
            raise UserError(f"inspect.every_n_steps is {every_n_steps}; it must be 0 or more")
        self.every_n_steps = every_n_steps
        self.pictures = pictures and every_n_steps > 0
        self.prompts = prompts
        self._batch: dict[str, Tensor] = {}
        self._views: Views | None = None
        self._shown = self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the text."""
        self._step = trainer.global_step
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        self._batch, self._views = {}, None
        if self.every_n_steps and isinstance(pl_module, GPTTask) and isinstance(data, OrderedData):
            rows = max(1, min(TOKENS // data.block_size, len(data.validation_windows)))
            batch = data.validation_windows.__getitems__(range(rows))
            kept = {"input_ids", "document_ids", "lengths"} & batch.keys()
            if "input_ids" not in kept:  # what is learned from is written as it is learned
                return
            self._batch = {name: batch[name][..., :TOKENS].to(pl_module.device) for name in kept}
            length = int(batch["lengths"][0]) if "lengths" in kept else TOKENS
            self._shown = min(SHOWN, length, self._batch["input_ids"].size(1))
            self._views = Views(data, self._batch["input_ids"][0, : self._shown].tolist()) if self.pictures else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, and log."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._batch and isinstance(pl_module, GPTTask) and due(self.every_n_steps, self._step):
            seen = self._look(trainer, pl_module, False)
            record(trainer, figures(seen, self._batch.get("lengths")), self._step - 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, and draw."""
        if self._views and isinstance(pl_module, GPTTask) and not trainer.sanity_checking:
            seen = self._look(trainer, pl_module, True)
            with trainer.precision_plugin.val_step_context():
                self._views.draw(trainer, pl_module, seen)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the embedding as it is in the end."""
        if self._views and isinstance(pl_module, GPTTask):
            self._views.project(trainer, pl_module)

    def _look(self, trainer: L.Trainer, task: GPTTask, whole: bool) -> Observation[Layer]:
        lengths, documents, mesh = self._batch.get("lengths"), self._batch.get("document_ids"), task.device_mesh

        def keep(seen: Seen) -> Layer:
            hidden = every_head(seen.hidden, 2, mesh)
            weights = None if seen.weights is None else every_head(seen.weights, 1, mesh)
            found = None if weights is None else looks(weights, documents, lengths)
            layer = Layer(found, answers(hidden, lengths), mean(seen.stream.float().square(), lengths).sqrt())
            if whole:
                drawn = None if weights is None else weights[0, :, : self._shown, : self._shown].float()
                layer = layer._replace(map=drawn, stream=seen.stream, hidden=hidden)
            return layer

        with trainer.precision_plugin.val_step_context():
            return observe(task.net, self._batch["input_ids"], documents, keep)


def mean(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean of (B, T, n) over each row's (B,) tokens, and not over those that fill it up; a scalar."""
    if lengths is None:
        return values.mean()
    there = torch.arange(values.size(1), device=values.device) < lengths[:, None]  # (B, T)
    return values[there].mean()


def figures(seen: Observation[Layer], lengths: Tensor | None = None) -> dict[str, float]:
    """What was seen, by name, of rows of these many tokens, (B,); see ``measured``."""
    found: dict[str, Tensor] = {}
    if seen.read.ndim == 3:  # a number at every token is no logit
        found["dynamics/logit_norm"] = mean(seen.read.float().norm(dim=-1, keepdim=True), lengths)
    shares = torch.stack([dead(layer.answers).float().mean() for layer in seen.layers])
    found["dynamics/dead_units"] = shares.mean()
    for number, (layer, share) in enumerate(zip(seen.layers, shares, strict=True), 1):
        found[f"dynamics/dead_units/layer_{number}"] = share
        found[f"dynamics/stream_norm/layer_{number}"] = layer.norm
    told = [(number, layer.looks) for number, layer in enumerate(seen.layers, 1) if layer.looks is not None]
    for name in Looks._fields if told else ():
        heads = torch.stack([getattr(look, name) for _, look in told])  # (n_layer, n_head)
        found[f"attention/{name}"] = heads.mean()
        for (number, _), of_layer in zip(told, heads, strict=True):
            found[f"attention/{name}/layer_{number}"] = of_layer.mean()
        if name == "sink":
            found["attention/sink/most"] = heads.amax()
    values = torch.stack(list(found.values())).tolist()  # waits for the device once
    return dict(zip(found, values, strict=True))
