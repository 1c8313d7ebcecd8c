"""Callbacks that log gradient norms, update ratios, and activation and attention statistics and plots."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter

from lit_gpt_scratch.batch_types import IGNORE_INDEX
from lit_gpt_scratch.callbacks import plotting
from lit_gpt_scratch.callbacks.checkpointing import PeriodicCallback
from lit_gpt_scratch.callbacks.event_logger import tolerate_write_errors
from lit_gpt_scratch.callbacks.metric_logging import log_metrics, tensorboard_writers
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
from lit_gpt_scratch.model.local_shard import to_local
from lit_gpt_scratch.model.output_heads import ClassificationHead, ScalarHead, TokenHead
from lit_gpt_scratch.optim.gradient_clipping import total_grad_norm
from lit_gpt_scratch.tasks.gpt_module import GPTModule
from lit_gpt_scratch.text.markdown import Markdown, format_markdown_table, markdown_code
from lit_gpt_scratch.text.tokenizer import Tokenizer

PARAMETER_PARTS: Final = ("embedding", "attention", "feed_forward", "norms", "head")
EMBEDDING_MODULES: Final = ("embedding", "bigrams", "smear", "position", "value_tables")
"""Names of the modules that embed tokens or positions."""


class GradientStats(PeriodicCallback):
    """Callback that logs the gradient norm per component and layer, and the update ratio per component.

    The update ratio is the norm of a step's weight update divided by the norm of the weights. With a suitable learning
    rate, it is about 0.001. If a component's ratio is far above or below those of the others, its learning rate,
    initialization or gradient scale is probably unsuitable. The metric names are listed in ``metric_logging.py``.

    Args:
        every_n_steps: Number of optimizer steps between measurements. The first step is always measured; 0 disables all
            measurements. A measurement keeps a copy of the trainable parameters in memory for one step.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._groups: dict[str, list[nn.Parameter]] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._norms: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Group the parameters by component and layer."""
        super().on_train_start(trainer, pl_module)
        net = getattr(pl_module, "net", None)
        self._groups = group_parameters(net) if isinstance(net, GPT) else {}

    def measure_gradient(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the gradient norms before clipping, and copy the weights."""
        for name, parameters in self._groups.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                self._norms[f"dynamics/gradient_norm/{name}"] = total_grad_norm(gradients)
            if name in PARAMETER_PARTS:
                self._before[name] = [p.detach().clone() for p in parameters]

    def measure_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute the update ratios, and log all metrics."""
        if not self._before:
            return
        n_gradients = len(self._norms)
        for name, before in self._before.items():
            moved = [p.detach() - old for p, old in zip(self._groups[name], before, strict=True)]
            self._norms[f"dynamics/update_ratio/{name}"] = total_grad_norm(moved)
            self._norms[f"before {name}"] = total_grad_norm(before)
        norms = torch.stack([norm.float() for norm in self._norms.values()]).tolist()  # one device synchronization
        figures = dict(zip(self._norms, norms, strict=True))
        values = dict(list(figures.items())[:n_gradients])
        for name in self._before:
            if (norm := figures[f"before {name}"]) != 0:  # weights initialized to zero have no ratio at first
                values[f"dynamics/update_ratio/{name}"] = figures[f"dynamics/update_ratio/{name}"] / norm
        log_metrics(trainer, values, trainer.global_step - 1)
        self._before, self._norms = {}, {}


def group_parameters(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Group the trainable parameters by component (``PARAMETER_PARTS``) and by layer (``layer_N``)."""
    found: dict[str, list[nn.Parameter]] = {part: [] for part in PARAMETER_PARTS}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            found[part_name(name)].append(parameter)
            if name.startswith("blocks."):
                found.setdefault(f"layer_{int(name.split('.')[1]) + 1}", []).append(parameter)
    return {name: parameters for name, parameters in found.items() if parameters}


def part_name(name: str) -> str:
    """Return the part to which the named parameter belongs; a head tied to the embedding belongs to the embedding."""
    pieces = name.split(".")
    for part in ("attention", "feed_forward"):
        if part in pieces:
            return part
    if pieces[0] in EMBEDDING_MODULES:
        return "embedding"
    return "head" if pieces[0] == "head" else "norms"


MAX_INSPECTED_TOKENS = 256
"""Maximum number of inspected tokens; the memory for attention weights grows quadratically with the window length."""
MAX_PLOTTED_TOKENS = 24
"""Maximum number of tokens shown in attention maps."""


class LayerStats(NamedTuple):
    """Statistics of one transformer block.

    Attributes:
        attention: Attention statistics per head, or None if a custom attention class does not record its weights.
        max_activations: Maximum magnitude of each feed-forward unit, float32 tensor of shape (ffn_dim,), or None for a
            mixture of experts.
        stream_rms: Root mean square of the residual stream after the block, float32 scalar.
        attention_map: Attention weights between the first t tokens, of shape (n_head, t, t); captured only for plots.
        stream: Residual stream after the block, of shape (B, T, n_embd); captured only for plots.
        hidden: Activations of the feed-forward units, of shape (B, T, ffn_dim); captured only for plots.
    """

    attention: AttentionStats | None
    max_activations: Tensor | None
    stream_rms: Tensor
    attention_map: Tensor | None = None
    stream: Tensor | None = None
    hidden: Tensor | None = None


class ActivationStats(PeriodicCallback):
    """Callback that runs the network on the first validation windows and logs statistics and plots of its activations.

    Statistics are computed with the training weights and logged every ``every_n_steps`` optimizer steps; the metric
    names are listed in ``metric_logging.py``. Plots, tables and histograms are computed with the validated weights,
    which may be a moving average, and logged after each validation run. The network runs uncompiled and in evaluation
    mode, consumes no random numbers, and is left unchanged. It runs on all ranks, so that every strategy is supported;
    only rank 0 draws the plots.

    Args:
        every_n_steps: Number of optimizer steps between measurements of gradient, activation and attention statistics.
            The first step is always measured. 0 disables these measurements, the loss breakdown and the plots.
        pictures: Whether to log attention maps, a logit lens table, the loss by position, the passages with the highest
            loss and histograms after each validation run, and the token embedding for TensorBoard's projector after
            training.
        prompts: Prompts that a language model continues after each validation run. If None, the prompts of the data
            module are used: for text, a short prompt and the beginnings of two validation documents; for chat data,
            the prompts of validation conversations. An empty list disables text samples.

    Raises:
        UserError: If ``every_n_steps`` is negative.
    """

    def __init__(self, every_n_steps: int = 100, pictures: bool = True, prompts: list[str] | None = None) -> None:
        if every_n_steps < 0:
            raise UserError(f"inspect.every_n_steps is {every_n_steps}; it must be 0 or more")
        self.every_n_steps = every_n_steps
        self.pictures = pictures and every_n_steps > 0
        self.prompts = prompts
        self._batch: dict[str, Tensor] = {}
        self._plots: ActivationPlots | None = None
        self._n_plotted = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Build the batch of validation windows to inspect."""
        super().on_train_start(trainer, pl_module)
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        self._batch, self._plots = {}, None
        if self.every_n_steps and isinstance(pl_module, GPTModule) and isinstance(data, BaseDataModule):
            rows = max(1, min(MAX_INSPECTED_TOKENS // data.block_size, len(data.validation_dataset)))
            batch = data.validation_dataset.make_batch(range(rows))
            names = {"input_ids", "document_ids", "lengths"} & batch.keys()
            if "input_ids" not in names:  # an RL policy generates its own inputs
                return
            self._batch = {name: batch[name][..., :MAX_INSPECTED_TOKENS].to(pl_module.device) for name in names}
            length = int(batch["lengths"][0]) if "lengths" in names else MAX_INSPECTED_TOKENS
            ids = self._batch["input_ids"]
            self._n_plotted = min(MAX_PLOTTED_TOKENS, length, ids.size(1))
            if self.pictures:
                labels = batch["labels"]
                has_next_tokens = (
                    isinstance(pl_module.output_head, TokenHead) and labels.shape == batch["input_ids"].shape
                )
                targets = labels[0, : self._n_plotted].tolist() if has_next_tokens else []
                self._plots = ActivationPlots(data, ids[0, : self._n_plotted].tolist(), targets)

    def measure_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the activation statistics."""
        if self._batch and isinstance(pl_module, GPTModule):
            captured = self._capture(trainer, pl_module, for_plots=False)
            log_metrics(trainer, activation_metrics(captured, self._batch.get("lengths")), trainer.global_step - 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the activation plots, computed with the validated weights."""
        if self._plots and isinstance(pl_module, GPTModule) and not trainer.sanity_checking:
            captured = self._capture(trainer, pl_module, for_plots=True)
            with trainer.precision_plugin.val_step_context():
                self._plots.log(trainer, pl_module, captured)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the final token embedding for TensorBoard's projector."""
        if self._plots and isinstance(pl_module, GPTModule):
            self._plots.log_embedding(trainer, pl_module)

    def _capture(self, trainer: L.Trainer, task: GPTModule, for_plots: bool) -> CapturedActivations[LayerStats]:
        lengths, documents, mesh = self._batch.get("lengths"), self._batch.get("document_ids"), task.device_mesh

        def keep(block: BlockActivations) -> LayerStats:
            hidden = None if block.hidden is None else gather_heads(block.hidden, 2, mesh)
            weights = None if block.weights is None else gather_heads(block.weights, 1, mesh)
            layer = LayerStats(
                None if weights is None else attention_stats(weights, documents, lengths),
                None if hidden is None else max_unit_activations(hidden, lengths),
                masked_mean(block.stream.float().square(), lengths).sqrt(),
            )
            if for_plots:
                n = self._n_plotted
                attention_map = None if weights is None else weights[0, :, :n, :n].float()
                layer = layer._replace(attention_map=attention_map, stream=block.stream, hidden=hidden)
            return layer

        with trainer.precision_plugin.val_step_context():
            return capture_activations(task.net, self._batch["input_ids"], documents, keep)


def masked_mean(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the mean of (B, T, n) values, excluding padding after the first ``lengths[i]`` tokens of row ``i``."""
    if lengths is None:
        return values.mean()
    mask = torch.arange(values.size(1), device=values.device) < lengths[:, None]  # (B, T)
    return values[mask].mean()


def activation_metrics(captured: CapturedActivations[LayerStats], lengths: Tensor | None = None) -> dict[str, float]:
    """Compute the metrics of captured activations, keyed by metric name (see ``metric_logging.py``).

    Args:
        captured: Activations for a batch of B rows of T tokens.
        lengths: Number of tokens per row, of shape (B,), or None if there is no padding.
    """
    found: dict[str, Tensor] = {}
    if captured.output.ndim == 3:  # a head that outputs one number per token has no logits
        found["dynamics/logit_norm"] = masked_mean(captured.output.float().norm(dim=-1, keepdim=True), lengths)
    shares = {
        number: dead_units(layer.max_activations).float().mean()
        for number, layer in enumerate(captured.layers, 1)
        if layer.max_activations is not None
    }
    if shares:
        found["dynamics/dead_units"] = torch.stack([*shares.values()]).mean()
    for number, layer in enumerate(captured.layers, 1):
        if number in shares:
            found[f"dynamics/dead_units/layer_{number}"] = shares[number]
        found[f"dynamics/stream_norm/layer_{number}"] = layer.stream_rms
    stats = [
        (number, layer.attention) for number, layer in enumerate(captured.layers, 1) if layer.attention is not None
    ]
    for name in AttentionStats._fields if stats else ():
        heads = torch.stack([getattr(of_layer, name) for _, of_layer in stats])  # (n_layer, n_head)
        found[f"attention/{name}"] = heads.mean()
        for (number, _), of_layer in zip(stats, heads, strict=True):
            found[f"attention/{name}/layer_{number}"] = of_layer.mean()
        if name == "sink":
            found["attention/sink/most"] = heads.amax()
    values = torch.stack(list(found.values())).tolist()  # one device synchronization
    return dict(zip(found, values, strict=True))


MAX_PLOTTED_LAYERS: Final = 4
"""Maximum number of layers shown in plots: the first, the last, and evenly spaced layers in between."""
MAX_PLOTTED_EXPERTS: Final = 32
"""Maximum number of experts shown per layer."""
MAX_PLOTTED_HEADS: Final = 4
"""Maximum number of attention heads shown per layer."""
LENS_POSITIONS: Final = 8
"""Maximum number of token positions shown in the logit lens table."""
HISTOGRAM_BINS: Final = 64
MAX_HISTOGRAM_VALUES: Final = 2**15
"""Approximate maximum number of values per tensor in a histogram; larger tensors are subsampled to save time."""
MAX_PROJECTOR_TOKENS: Final = 512
"""Maximum number of tokens in the projector. A larger vocabulary is reduced to its lowest ids.

These are the special tokens, the bytes and the most frequent merges.
"""


class ActivationPlots:
    """Plots of a network's activations, logged to TensorBoard.

    Args:
        data: Data module, after ``setup``.
        ids: Ids of the first inspected tokens, which label the rows and columns of the attention maps.
        targets: Labels of the tokens in ``ids`` (the next token's id or ``IGNORE_INDEX``), or an empty list if the
            network does not predict tokens.
    """

    def __init__(self, data: BaseDataModule, ids: list[int], targets: list[int]) -> None:
        self.data = data
        self.tokens = [printable_token(data.tokenizer, id_) for id_ in ids]
        self.targets = targets

    def log(self, trainer: L.Trainer, task: GPTModule, captured: CapturedActivations[LayerStats]) -> None:
        """Log all plots after a validation run; must be called on every rank."""
        lens = self._logit_lens(task.net, captured)
        for board in tensorboard_writers(trainer):
            step = trainer.global_step - 1  # step at which Lightning logs validation metrics
            self._log_attention(board, captured.layers, step)
            if task.expert_balancing is not None and task.expert_balancing.load.any():
                self._log_expert_load(board, task.expert_balancing.load, step)
            if lens is not None:
                board.add_text("views/logit_lens", lens, step)
            for name, parameters in group_parameters(task.net).items():
                if name in PARAMETER_PARTS:  # if the network is sharded, only the shard of rank 0
                    add_histogram(board, f"weights/{name}", [to_local(p) for p in parameters], step)
            for number in select_layers(len(captured.layers)):
                layer = captured.layers[number]
                for name, values in (("stream", layer.stream), ("feed_forward", layer.hidden)):
                    if values is not None:
                        add_histogram(board, f"activations/{name}/layer_{number + 1}", [values], step)

    def _log_expert_load(self, board: SummaryWriter, load: Tensor, step: int) -> None:
        """Plot the load of each expert in the last step, of shape (n_layer, n_experts), relative to its mean."""
        experts = load.size(1)
        relative = (load[:, :MAX_PLOTTED_EXPERTS] / load.double().mean(-1, keepdim=True)).cpu().numpy()
        shown = "" if experts <= MAX_PLOTTED_EXPERTS else f" (the first {MAX_PLOTTED_EXPERTS} of {experts})"
        picture = plotting.heat_map(
            relative / max(1.0, relative.max()),
            [[f"{value:.1f}" for value in row] for row in relative],
            [f"layer {number}" for number in range(1, len(relative) + 1)],
            [f"{number}" for number in range(1, relative.shape[1] + 1)],
            title=f"load of each expert (column), relative to the mean{shown}",
            cell=36,
        )
        board.add_image("views/expert_load", picture, step, dataformats="HWC")

    def _log_attention(self, board: SummaryWriter, layers: Sequence[LayerStats], step: int) -> None:
        stats = [(number, layer.attention) for number, layer in enumerate(layers, 1) if layer.attention is not None]
        for name in AttentionStats._fields if stats else ():
            heads = np.stack([getattr(of_layer, name).cpu().numpy() for _, of_layer in stats])  # (n_layer, n_head)
            finite = heads[np.isfinite(heads)]
            top = 1.0 if name == "sink" else float(finite.max(initial=0.0)) or 1.0
            picture = plotting.heat_map(
                heads / top,
                [[f"{value:.2f}" for value in row] for row in heads],
                [f"layer {number}" for number, _ in stats],
                [f"head {head + 1}" for head in range(heads.shape[1])],
                title=f"attention {name}",
                cell=48,
            )
            board.add_image(f"views/attention_{name}", picture, step, dataformats="HWC")
        for number in select_layers(len(layers)):
            if (weights := layers[number].attention_map) is not None:
                maps = weights[:MAX_PLOTTED_HEADS].cpu().numpy()
                titles = [f"layer {number + 1}, head {head + 1}" for head in range(len(maps))]
                picture = plotting.attention_maps(maps, self.tokens, titles)
                board.add_image(f"views/attention/layer_{number + 1}", picture, step, dataformats="HWC")

    @torch.no_grad()
    def _logit_lens(self, net: GPT, captured: CapturedActivations[LayerStats]) -> str | None:
        """Format a Markdown table of the head's predictions from the residual stream after each layer.

        Correct predictions are marked. Returns None if the head has no logits, because it outputs one number per token.
        """
        if isinstance(net.output_head, ScalarHead):
            return None
        end = len(self.tokens)
        shown = slice(max(0, end - LENS_POSITIONS), end)
        rows = [["after", *(markdown_code(token) for token in self.tokens[shown])]]
        targets = self.targets[shown]
        if targets:
            rows.append(["true next token", *(self._target_name(id_) for id_ in targets)])
        streams = [captured.embeddings, *(layer.stream for layer in captured.layers if layer.stream is not None)]
        for depth, stream in enumerate(streams):
            best = net.logit_lens(stream[:1, shown]).softmax(-1).max(-1)  # (1, positions)
            cells = []
            for place, (share, id_) in enumerate(zip(best.values[0].tolist(), best.indices[0].tolist(), strict=True)):
                mark = "✓ " if targets and targets[place] == id_ else ""
                name = markdown_code(self._output_name(net, id_))
                cells.append(Markdown(f"{mark}{name} {share:.0%}") if share == share else "NaN")
            rows.append([f"layer {depth}" if depth else "the embedding", *cells])
        table = format_markdown_table(rows, "<" * len(rows[0]))
        return (
            "Most probable output after each token (column) if the network ended after the layer in the row; "
            f"✓ marks correct predictions.\n\n{table}"
        )

    def _target_name(self, id_: int) -> str:
        return "" if id_ == IGNORE_INDEX else markdown_code(printable_token(self.data.tokenizer, id_))

    def _output_name(self, net: GPT, number: int) -> str:
        """Return the display name of an output index of the output head: the token's text or the class name."""
        if isinstance(net.output_head, ClassificationHead):
            return net.output_head.class_names[number] if net.output_head.class_names else str(number)
        return printable_token(self.data.tokenizer, number)

    @torch.no_grad()
    def log_embedding(self, trainer: L.Trainer, task: GPTModule) -> None:
        """Log the token embedding for TensorBoard's projector; must be called on every rank."""
        weight = task.net.embedding.weight
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        table = whole[: min(MAX_PROJECTOR_TOKENS, task.net.vocab_size)]
        for board in tensorboard_writers(trainer):
            shutil.rmtree(Path(board.log_dir, "projector"), ignore_errors=True)  # written by an earlier session
            labels = [printable_token(self.data.tokenizer, id_) for id_ in range(len(table))]
            with tolerate_write_errors("the embedding for the projector"):
                board.add_embedding(table.float().cpu(), labels, tag="tokens", global_step="projector")


def select_layers(n: int) -> list[int]:
    """Select at most ``MAX_PLOTTED_LAYERS`` evenly spaced layer indices below ``n``, including the first and last."""
    return sorted({round(place) for place in np.linspace(0, n - 1, min(n, MAX_PLOTTED_LAYERS)).tolist()})


def printable_token(tokenizer: Tokenizer, id_: int) -> str:
    """Decode a token to one line of text; spaces become dots, and unprintable characters are escaped as in Python."""
    shown = ("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in tokenizer.decode([id_]))
    return "".join(shown) or "(nothing)"


def add_histogram(board: SummaryWriter, name: str, tensors: Sequence[Tensor], step: int) -> None:
    """Log an equal-width histogram of all finite values; this is faster than ``SummaryWriter.add_histogram``.

    Large tensors are subsampled at regular intervals to about ``MAX_HISTOGRAM_VALUES`` values.
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
