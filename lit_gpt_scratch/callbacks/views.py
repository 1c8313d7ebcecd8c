"""What was seen inside a network, as pictures, tables and histograms in TensorBoard."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter

from lit_gpt_scratch.callbacks import drawing
from lit_gpt_scratch.callbacks.dynamics import PARTS, groups
from lit_gpt_scratch.callbacks.measured import boards
from lit_gpt_scratch.data import LabelledText
from lit_gpt_scratch.data.ordered import OrderedData
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.model.heads import Classes, Scalar
from lit_gpt_scratch.model.inspection import Looks, Observation
from lit_gpt_scratch.optim.parts import own_part
from lit_gpt_scratch.tasks.gpt_task import GPTTask
from lit_gpt_scratch.text.audit import drawn
from lit_gpt_scratch.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lit_gpt_scratch.callbacks.inspection import Layer

LAYERS: Final = 4
"""Of which there are pictures: the first, the last, and those between at equal distances."""
HEADS: Final = 4
"""Whose weights are drawn, of a layer."""
PLACES: Final = 8
"""Tokens that the logit lens is shown behind."""
BINS: Final = 64
VALUES: Final = 2**15
"""Of each tensor that a histogram counts, at most: the shape is the same, the time a tenth."""
POINTS: Final = 512
"""Tokens in the projector, at most: the first, which are special ones, bytes, and what was joined most."""


class Views:
    """Draws them.

    Args:
        data: Set up.
        ids: The first tokens of the fixed text, those whose attention is drawn.
    """

    def __init__(self, data: OrderedData, ids: list[int]) -> None:
        self.data = data
        self.tokens = [spelled(data.tokenizer, id_) for id_ in ids]

    def draw(self, trainer: L.Trainer, task: GPTTask, seen: "Observation[Layer]") -> None:
        """All that is drawn after a validation; every rank has to ask."""
        lens = self._lens(task.net, seen)
        for board in boards(trainer):
            step = trainer.global_step - 1  # as Lightning numbers a validation
            self._attention(board, seen.layers, step)
            if lens is not None:
                board.add_text("views/logit_lens", lens, step)
            for name, parameters in groups(task.net).items():
                if name in PARTS:  # of a network that is cut, this process's part
                    histogram(board, f"weights/{name}", [own_part(p) for p in parameters], step)
            for number in chosen(len(seen.layers)):
                layer = seen.layers[number]
                for name, values in (("stream", layer.stream), ("feed_forward", layer.hidden)):
                    assert values is not None
                    histogram(board, f"activations/{name}/layer_{number + 1}", [values], step)

    def _attention(self, board: SummaryWriter, layers: "Sequence[Layer]", step: int) -> None:
        told = [(number, layer.looks) for number, layer in enumerate(layers, 1) if layer.looks is not None]
        for name in Looks._fields if told else ():
            heads = np.stack([getattr(look, name).cpu().numpy() for _, look in told])  # (n_layer, n_head)
            known = heads[np.isfinite(heads)]
            most = 1.0 if name == "sink" else float(known.max(initial=0.0)) or 1.0
            picture = drawing.table(
                heads / most,
                [[f"{value:.2f}" for value in row] for row in heads],
                [f"layer {number}" for number, _ in told],
                [f"head {head + 1}" for head in range(heads.shape[1])],
                cell=48,
            )
            board.add_image(f"views/attention_{name}", picture, step, dataformats="HWC")
        for number in chosen(len(layers)):
            if (weights := layers[number].map) is not None:
                titles = [f"layer {number + 1}, head {head + 1}" for head in range(min(HEADS, len(weights)))]
                picture = drawing.attention_maps(weights[:HEADS].cpu().numpy(), self.tokens, titles)
                board.add_image(f"views/attention/layer_{number + 1}", picture, step, dataformats="HWC")

    @torch.no_grad()
    def _lens(self, net: GPT, seen: "Observation[Layer]") -> str | None:
        """What the head would read behind each layer, as a table."""
        if isinstance(net.reads, Scalar):
            return None
        end = len(self.tokens)
        places = slice(max(0, end - PLACES), end)
        rows = [["behind", *(code(token) for token in self.tokens[places])]]
        streams = [seen.start, *(layer.stream for layer in seen.layers if layer.stream is not None)]
        for depth, stream in enumerate(streams):
            chances, likeliest = net.lens(stream[:1, places]).softmax(-1).max(-1)  # (1, places)
            names = (self._name(net, id_) for id_ in likeliest[0].tolist())
            told = zip(names, chances[0].tolist(), strict=True)
            cells = [f"{code(name)} {chance:.0%}" if chance == chance else "not a number" for name, chance in told]
            rows.append([f"layer {depth}" if depth else "the embedding", *cells])
        table = drawn(rows, "<" * len(rows[0]))
        return f"Its likeliest reading behind each token, if the network ended there.\n\n{table}"

    def _name(self, net: GPT, number: int) -> str:
        """Of what the head reads: a token, or a class."""
        if isinstance(net.reads, Classes) and isinstance(self.data, LabelledText):
            return self.data.class_names[number]
        return spelled(self.data.tokenizer, number)

    @torch.no_grad()
    def project(self, trainer: L.Trainer, task: GPTTask) -> None:
        """Leave the embedding for TensorBoard's projector; every rank has to ask."""
        weight = task.net.embedding.weight
        table = (weight.full_tensor() if isinstance(weight, DTensor) else weight)[: min(POINTS, task.net.vocab_size)]
        for board in boards(trainer):
            shutil.rmtree(Path(board.log_dir, "projector"), ignore_errors=True)  # of an earlier session
            labels = [spelled(self.data.tokenizer, id_) for id_ in range(len(table))]
            board.add_embedding(table.float().cpu(), labels, tag="tokens", global_step="projector")


def chosen(n: int) -> list[int]:
    """Some of so many layers, the first and the last among them, from 0."""
    return sorted({round(place) for place in np.linspace(0, n - 1, min(n, LAYERS)).tolist()})


def spelled(tokenizer: Tokenizer, id_: int) -> str:
    """A token as it can be read in a line: spaces as dots, what cannot be printed as in Python's strings."""
    shown = ("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in tokenizer.decode([id_]))
    return "".join(shown) or "(nothing)"


def code(text: str) -> str:
    """A text as Markdown's tables leave it alone."""
    return f"`{text.replace('`', chr(39)).replace('|', '¦')}`"


def histogram(board: SummaryWriter, name: str, tensors: Sequence[Tensor], step: int) -> None:
    """A histogram in equal bins, which takes a fraction of the time of TensorBoard's own; of finite values alone.

    Of more than ``VALUES`` of a tensor some are taken, at equal distances.
    """
    flat = [tensor.detach().flatten() for tensor in tensors]
    parts = [part[:: max(1, len(part) // VALUES)].float() for part in flat]
    parts = [part if part.isfinite().all() else part[part.isfinite()] for part in parts]
    parts = [part for part in parts if len(part)]
    if not parts:
        return
    low, high = min(part.min().item() for part in parts), max(part.max().item() for part in parts)
    high = high if high > low else low + 1e-6
    counts = sum(torch.histc(part, BINS, low, high) for part in parts)
    assert isinstance(counts, Tensor)
    board.add_histogram_raw(
        name,
        low,
        high,
        sum(len(part) for part in parts),
        sum(part.sum().item() for part in parts),
        sum(part.square().sum().item() for part in parts),
        torch.linspace(low, high, BINS + 1)[1:].tolist(),
        counts.tolist(),
        step,
    )
