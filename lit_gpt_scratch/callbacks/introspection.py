"""How a step moves the network: gradients and updates by part."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter

from lit_gpt_scratch.callbacks import plotting
from lit_gpt_scratch.callbacks.metric_logging import log_metrics, tensorboard_writers
from lit_gpt_scratch.data import LabelledText
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.distributed.parallelize import gather_heads
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.activation_hooks import (
    AttentionStats,
    BlockActivations,
    CapturedActivations,
    attention_stats,
    capture_activations,
    dead_units,
    max_unit_activations,
)
from lit_gpt_scratch.model.output_heads import ClassificationHead, ScalarHead
from lit_gpt_scratch.optim.dtensor import to_local
from lit_gpt_scratch.optim.gradient_clipping import total_grad_norm
from lit_gpt_scratch.tasks.gpt_module import GPTModule
from lit_gpt_scratch.text.markdown_table import format_markdown_table
from lit_gpt_scratch.text.tokenizer import Tokenizer

PARAMETER_PARTS: Final = ("embedding", "attention", "feed_forward", "norms", "head")
EMBEDDING_MODULES: Final = ("embedding", "bigrams", "smear", "position", "value_tables")
"""What a name begins with of all that makes vectors of tokens and places."""


class GradientStats(Callback):
    """Every so many steps log the norm of the gradient of each part and layer, and how far the step moves each part.

    A learning rate that suits the network moves weights by about a thousandth of their norm a step; parts that move far
    more, or far less, than the others have a rate, a scale or a gradient that does not. For their names see
    ``measured``.

    Args:
        every_n_steps: Optimizer steps from one measurement to the next; the first step is measured, too. 0 for never.
            Measuring keeps a copy of the trained weights over one step.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._groups: dict[str, list[nn.Parameter]] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._norms: dict[str, Tensor] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn which parameters there are."""
        self._step = trainer.global_step
        net = getattr(pl_module, "net", None)
        self._groups = group_parameters(net) if isinstance(net, GPT) else {}

    def on_gradient(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the norms of the gradient, and remember the weights."""
        if not is_due(self.every_n_steps, trainer.global_step + 1):
            return
        for name, parameters in self._groups.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                self._norms[f"dynamics/gradient_norm/{name}"] = total_grad_norm(gradients)
            if name in PARAMETER_PARTS:
                self._before[name] = [p.detach().clone() for p in parameters]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the weights with what they were."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if not self._before:
            return
        n_gradients = len(self._norms)
        for name, before in self._before.items():
            moved = [p.detach() - old for p, old in zip(self._groups[name], before, strict=True)]
            self._norms[f"dynamics/update_ratio/{name}"] = total_grad_norm(moved)
            self._norms[f"before {name}"] = total_grad_norm(before)
        norms = torch.stack([norm.float() for norm in self._norms.values()]).tolist()  # waits for the device once
        figures = dict(zip(self._norms, norms, strict=True))
        values = dict(list(figures.items())[:n_gradients])
        for name in self._before:
            if (norm := figures[f"before {name}"]) != 0:  # what began at zero has no ratio yet
                values[f"dynamics/update_ratio/{name}"] = figures[f"dynamics/update_ratio/{name}"] / norm
        log_metrics(trainer, values, self._step - 1)
        self._before, self._norms = {}, {}


def is_due(every_n_steps: int, step: int) -> bool:
    """Whether something that is done every so many steps is done after this one, counted from 1."""
    return every_n_steps > 0 and (step == 1 or step % every_n_steps == 0)


def group_parameters(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What is trained of a network: its parts, each with all that is of it, and its layers."""
    found: dict[str, list[nn.Parameter]] = {part: [] for part in PARAMETER_PARTS}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            found[part_name(name)].append(parameter)
            if name.startswith("blocks."):
                found.setdefault(f"layer_{int(name.split('.')[1]) + 1}", []).append(parameter)
    return {name: parameters for name, parameters in found.items() if parameters}


def part_name(name: str) -> str:
    """Of which part a parameter is, by its name in the network; a head that is the embedding is that."""
    pieces = name.split(".")
    for part in ("attention", "feed_forward"):
        if part in pieces:
            return part
    if pieces[0] in EMBEDDING_MODULES:
        return "embedding"
    return "head" if pieces[0] == "head" else "norms"


MAX_INSPECTED_TOKENS = 256
"""Tokens of the fixed text, at most: attention weights grow with the square of a window."""
MAX_PLOTTED_TOKENS = 24
"""Tokens whose weights are drawn."""


class LayerStats(NamedTuple):
    """What is kept of a block.

    Attributes:
        looks: How its heads look back; None if attention of one's own does not tell.
        answers: (ffn_dim,) float32, the largest magnitude of each feed-forward unit.
        norm: Root mean square of the stream behind it: a float32 scalar.
        map: (n_head, t, t), who of the first tokens looks at whom, if pictures are drawn.
        stream: (B, T, n_embd), if pictures are drawn.
        hidden: (B, T, ffn_dim), the same.
    """

    looks: AttentionStats | None
    answers: Tensor
    norm: Tensor
    map: Tensor | None = None
    stream: Tensor | None = None
    hidden: Tensor | None = None


class ActivationStats(Callback):
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
        self._views: ActivationPlots | None = None
        self._shown = self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the text."""
        self._step = trainer.global_step
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        self._batch, self._views = {}, None
        if self.every_n_steps and isinstance(pl_module, GPTModule) and isinstance(data, BaseDataModule):
            rows = max(1, min(MAX_INSPECTED_TOKENS // data.block_size, len(data.validation_dataset)))
            batch = data.validation_dataset.__getitems__(range(rows))
            kept = {"input_ids", "document_ids", "lengths"} & batch.keys()
            if "input_ids" not in kept:  # what is learned from is written as it is learned
                return
            self._batch = {name: batch[name][..., :MAX_INSPECTED_TOKENS].to(pl_module.device) for name in kept}
            length = int(batch["lengths"][0]) if "lengths" in kept else MAX_INSPECTED_TOKENS
            self._shown = min(MAX_PLOTTED_TOKENS, length, self._batch["input_ids"].size(1))
            self._views = (
                ActivationPlots(data, self._batch["input_ids"][0, : self._shown].tolist()) if self.pictures else None
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, and log."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._batch and isinstance(pl_module, GPTModule) and is_due(self.every_n_steps, self._step):
            seen = self._look(trainer, pl_module, False)
            log_metrics(trainer, activation_metrics(seen, self._batch.get("lengths")), self._step - 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, and draw."""
        if self._views and isinstance(pl_module, GPTModule) and not trainer.sanity_checking:
            seen = self._look(trainer, pl_module, True)
            with trainer.precision_plugin.val_step_context():
                self._views.draw(trainer, pl_module, seen)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the embedding as it is in the end."""
        if self._views and isinstance(pl_module, GPTModule):
            self._views.project(trainer, pl_module)

    def _look(self, trainer: L.Trainer, task: GPTModule, whole: bool) -> CapturedActivations[LayerStats]:
        lengths, documents, mesh = self._batch.get("lengths"), self._batch.get("document_ids"), task.device_mesh

        def keep(seen: BlockActivations) -> LayerStats:
            hidden = gather_heads(seen.hidden, 2, mesh)
            weights = None if seen.weights is None else gather_heads(seen.weights, 1, mesh)
            found = None if weights is None else attention_stats(weights, documents, lengths)
            layer = LayerStats(
                found, max_unit_activations(hidden, lengths), masked_mean(seen.stream.float().square(), lengths).sqrt()
            )
            if whole:
                drawn = None if weights is None else weights[0, :, : self._shown, : self._shown].float()
                layer = layer._replace(map=drawn, stream=seen.stream, hidden=hidden)
            return layer

        with trainer.precision_plugin.val_step_context():
            return capture_activations(task.net, self._batch["input_ids"], documents, keep)


def masked_mean(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean of (B, T, n) over each row's (B,) tokens, and not over those that fill it up; a scalar."""
    if lengths is None:
        return values.mean()
    there = torch.arange(values.size(1), device=values.device) < lengths[:, None]  # (B, T)
    return values[there].mean()


def activation_metrics(seen: CapturedActivations[LayerStats], lengths: Tensor | None = None) -> dict[str, float]:
    """What was seen, by name, of rows of these many tokens, (B,); see ``measured``."""
    found: dict[str, Tensor] = {}
    if seen.output.ndim == 3:  # a number at every token is no logit
        found["dynamics/logit_norm"] = masked_mean(seen.output.float().norm(dim=-1, keepdim=True), lengths)
    shares = torch.stack([dead_units(layer.answers).float().mean() for layer in seen.layers])
    found["dynamics/dead_units"] = shares.mean()
    for number, (layer, share) in enumerate(zip(seen.layers, shares, strict=True), 1):
        found[f"dynamics/dead_units/layer_{number}"] = share
        found[f"dynamics/stream_norm/layer_{number}"] = layer.norm
    told = [(number, layer.looks) for number, layer in enumerate(seen.layers, 1) if layer.looks is not None]
    for name in AttentionStats._fields if told else ():
        heads = torch.stack([getattr(look, name) for _, look in told])  # (n_layer, n_head)
        found[f"attention/{name}"] = heads.mean()
        for (number, _), of_layer in zip(told, heads, strict=True):
            found[f"attention/{name}/layer_{number}"] = of_layer.mean()
        if name == "sink":
            found["attention/sink/most"] = heads.amax()
    values = torch.stack(list(found.values())).tolist()  # waits for the device once
    return dict(zip(found, values, strict=True))


if TYPE_CHECKING:
    from lit_gpt_scratch.callbacks.introspection import LayerStats

MAX_PLOTTED_LAYERS: Final = 4
"""Of which there are pictures: the first, the last, and those between at equal distances."""
MAX_PLOTTED_HEADS: Final = 4
"""Whose weights are drawn, of a layer."""
LENS_POSITIONS: Final = 8
"""Tokens that the logit lens is shown behind."""
HISTOGRAM_BINS: Final = 64
MAX_HISTOGRAM_VALUES: Final = 2**15
"""Of each tensor that a histogram counts, at most: the shape is the same, the time a tenth."""
MAX_PROJECTOR_TOKENS: Final = 512
"""Tokens in the projector, at most: the first, which are special ones, bytes, and what was joined most."""


class ActivationPlots:
    """Draws them.

    Args:
        data: Set up.
        ids: The first tokens of the fixed text, those whose attention is drawn.
    """

    def __init__(self, data: BaseDataModule, ids: list[int]) -> None:
        self.data = data
        self.tokens = [printable_token(data.tokenizer, id_) for id_ in ids]

    def draw(self, trainer: L.Trainer, task: GPTModule, seen: "CapturedActivations[LayerStats]") -> None:
        """All that is drawn after a validation; every rank has to ask."""
        lens = self._lens(task.net, seen)
        for board in tensorboard_writers(trainer):
            step = trainer.global_step - 1  # as Lightning numbers a validation
            self._attention(board, seen.layers, step)
            if lens is not None:
                board.add_text("views/logit_lens", lens, step)
            for name, parameters in group_parameters(task.net).items():
                if name in PARAMETER_PARTS:  # of a network that is cut, this process's part
                    add_histogram(board, f"weights/{name}", [to_local(p) for p in parameters], step)
            for number in select_layers(len(seen.layers)):
                layer = seen.layers[number]
                for name, values in (("stream", layer.stream), ("feed_forward", layer.hidden)):
                    assert values is not None
                    add_histogram(board, f"activations/{name}/layer_{number + 1}", [values], step)

    def _attention(self, board: SummaryWriter, layers: "Sequence[LayerStats]", step: int) -> None:
        told = [(number, layer.looks) for number, layer in enumerate(layers, 1) if layer.looks is not None]
        for name in AttentionStats._fields if told else ():
            heads = np.stack([getattr(look, name).cpu().numpy() for _, look in told])  # (n_layer, n_head)
            known = heads[np.isfinite(heads)]
            most = 1.0 if name == "sink" else float(known.max(initial=0.0)) or 1.0
            picture = plotting.table(
                heads / most,
                [[f"{value:.2f}" for value in row] for row in heads],
                [f"layer {number}" for number, _ in told],
                [f"head {head + 1}" for head in range(heads.shape[1])],
                cell=48,
            )
            board.add_image(f"views/attention_{name}", picture, step, dataformats="HWC")
        for number in select_layers(len(layers)):
            if (weights := layers[number].map) is not None:
                titles = [
                    f"layer {number + 1}, head {head + 1}" for head in range(min(MAX_PLOTTED_HEADS, len(weights)))
                ]
                picture = plotting.attention_maps(weights[:MAX_PLOTTED_HEADS].cpu().numpy(), self.tokens, titles)
                board.add_image(f"views/attention/layer_{number + 1}", picture, step, dataformats="HWC")

    @torch.no_grad()
    def _lens(self, net: GPT, seen: "CapturedActivations[LayerStats]") -> str | None:
        """What the head would read behind each layer, as a table."""
        if isinstance(net.output_head, ScalarHead):
            return None
        end = len(self.tokens)
        places = slice(max(0, end - LENS_POSITIONS), end)
        rows = [["behind", *(markdown_code(token) for token in self.tokens[places])]]
        streams = [seen.embeddings, *(layer.stream for layer in seen.layers if layer.stream is not None)]
        for depth, stream in enumerate(streams):
            chances, likeliest = net.logit_lens(stream[:1, places]).softmax(-1).max(-1)  # (1, places)
            names = (self._name(net, id_) for id_ in likeliest[0].tolist())
            told = zip(names, chances[0].tolist(), strict=True)
            cells = [
                f"{markdown_code(name)} {chance:.0%}" if chance == chance else "not a number" for name, chance in told
            ]
            rows.append([f"layer {depth}" if depth else "the embedding", *cells])
        table = format_markdown_table(rows, "<" * len(rows[0]))
        return f"Its likeliest reading behind each token, if the network ended there.\n\n{table}"

    def _name(self, net: GPT, number: int) -> str:
        """Of what the head reads: a token, or a class."""
        if isinstance(net.output_head, ClassificationHead) and isinstance(self.data, LabelledText):
            return self.data.class_names[number]
        return printable_token(self.data.tokenizer, number)

    @torch.no_grad()
    def project(self, trainer: L.Trainer, task: GPTModule) -> None:
        """Leave the embedding for TensorBoard's projector; every rank has to ask."""
        weight = task.net.embedding.weight
        table = (weight.full_tensor() if isinstance(weight, DTensor) else weight)[
            : min(MAX_PROJECTOR_TOKENS, task.net.vocab_size)
        ]
        for board in tensorboard_writers(trainer):
            shutil.rmtree(Path(board.log_dir, "projector"), ignore_errors=True)  # of an earlier session
            labels = [printable_token(self.data.tokenizer, id_) for id_ in range(len(table))]
            board.add_embedding(table.float().cpu(), labels, tag="tokens", global_step="projector")


def select_layers(n: int) -> list[int]:
    """Some of so many layers, the first and the last among them, from 0."""
    return sorted({round(place) for place in np.linspace(0, n - 1, min(n, MAX_PLOTTED_LAYERS)).tolist()})


def printable_token(tokenizer: Tokenizer, id_: int) -> str:
    """A token as it can be read in a line: spaces as dots, what cannot be printed as in Python's strings."""
    shown = ("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in tokenizer.decode([id_]))
    return "".join(shown) or "(nothing)"


def markdown_code(text: str) -> str:
    """A text as Markdown's tables leave it alone."""
    return f"`{text.replace('`', chr(39)).replace('|', '¦')}`"


def add_histogram(board: SummaryWriter, name: str, tensors: Sequence[Tensor], step: int) -> None:
    """A histogram in equal bins, which takes a fraction of the time of TensorBoard's own; of finite values alone.

    Of more than ``MAX_HISTOGRAM_VALUES`` of a tensor some are taken, at equal distances.
    """
    flat = [tensor.detach().flatten() for tensor in tensors]
    parts = [part[:: max(1, len(part) // MAX_HISTOGRAM_VALUES)].float() for part in flat]
    parts = [part if part.isfinite().all() else part[part.isfinite()] for part in parts]
    parts = [part for part in parts if len(part)]
    if not parts:
        return
    low, high = min(part.min().item() for part in parts), max(part.max().item() for part in parts)
    high = high if high > low else low + 1e-6
    counts = sum(torch.histc(part, HISTOGRAM_BINS, low, high) for part in parts)
    assert isinstance(counts, Tensor)
    board.add_histogram_raw(
        name,
        low,
        high,
        sum(len(part) for part in parts),
        sum(part.sum().item() for part in parts),
        sum(part.square().sum().item() for part in parts),
        torch.linspace(low, high, HISTOGRAM_BINS + 1)[1:].tolist(),
        counts.tolist(),
        step,
    )
