"""How a step moves the network: gradients and updates by part."""

from typing import Any, Final

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lit_gpt_scratch.callbacks.measured import record
from lit_gpt_scratch.model import GPT
from lit_gpt_scratch.optim.parts import total_norm

PARTS: Final = ("embedding", "attention", "feed_forward", "norms", "head")
TABLES: Final = ("embedding", "bigrams", "smear", "position", "value_tables")
"""What a name begins with of all that makes vectors of tokens and places."""


class Dynamics(Callback):
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
        self._groups = groups(net) if isinstance(net, GPT) else {}

    def on_gradient(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the norms of the gradient, and remember the weights."""
        if not due(self.every_n_steps, trainer.global_step + 1):
            return
        for name, parameters in self._groups.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                self._norms[f"dynamics/gradient_norm/{name}"] = total_norm(gradients)
            if name in PARTS:
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
            self._norms[f"dynamics/update_ratio/{name}"] = total_norm(moved)
            self._norms[f"before {name}"] = total_norm(before)
        norms = torch.stack([norm.float() for norm in self._norms.values()]).tolist()  # waits for the device once
        figures = dict(zip(self._norms, norms, strict=True))
        values = dict(list(figures.items())[:n_gradients])
        for name in self._before:
            if (norm := figures[f"before {name}"]) != 0:  # what began at zero has no ratio yet
                values[f"dynamics/update_ratio/{name}"] = figures[f"dynamics/update_ratio/{name}"] / norm
        record(trainer, values, self._step - 1)
        self._before, self._norms = {}, {}


def due(every_n_steps: int, step: int) -> bool:
    """Whether something that is done every so many steps is done after this one, counted from 1."""
    return every_n_steps > 0 and (step == 1 or step % every_n_steps == 0)


def groups(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What is trained of a network: its parts, each with all that is of it, and its layers."""
    found: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            found[part_of(name)].append(parameter)
            if name.startswith("blocks."):
                found.setdefault(f"layer_{int(name.split('.')[1]) + 1}", []).append(parameter)
    return {name: parameters for name, parameters in found.items() if parameters}


def part_of(name: str) -> str:
    """Of which part a parameter is, by its name in the network; a head that is the embedding is that."""
    pieces = name.split(".")
    for part in ("attention", "feed_forward"):
        if part in pieces:
            return part
    if pieces[0] in TABLES:
        return "embedding"
    return "head" if pieces[0] == "head" else "norms"
