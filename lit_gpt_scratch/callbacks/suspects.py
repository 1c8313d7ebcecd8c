"""What in a step made its loss or its gradient what it is."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_gpt_scratch.data.ordered import OrderedData
from lit_gpt_scratch.model.inspection import undisturbed
from lit_gpt_scratch.tasks.stage import Stage

EXCERPT = 160
"""Characters of a text that is shown."""
PLACES = 3
"""Windows of a step that are shown."""


def where_not_finite(trainer: L.Trainer, task: L.LightningModule, batches: Sequence[Any]) -> str:
    """Where a step's numbers stopped being finite: forward again through its batches, then by its gradient.

    Every rank has to ask, because weights may be cut among them. A step that was done has left it in the weights.
    """
    named = [(name.removeprefix("net."), p) for name, p in task.named_parameters() if p.grad is not None]
    weights = [name for name, p in named if not p.detach().isfinite().all()]
    if weights:
        return f"already in {len(weights)} of {len(named)} weights, {weights[0]} the first of them"
    if isinstance(task, Stage):
        for batch in batches:
            part = _first_part(trainer, task, batch)
            if part is not None:
                return f"forward, first out of {part}"
    gradients = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
    if not gradients:
        return "in the loss alone, not in its gradient"
    if len(gradients) == len(named):
        return "not in a forward pass, but in the whole gradient: in the loss itself, or on the way back from it"
    return f"backward, first at {gradients[-1]}, in {len(gradients)} of {len(named)} gradients"


def _first_part(trainer: L.Trainer, task: Stage, batch: Any) -> str | None:
    """The first part of a network whose output is not finite, or None."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not found and isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            found.append(name)

    with undisturbed(task), torch.no_grad(), trainer.precision_plugin.train_step_context():
        hooks = [
            part.register_forward_hook(lambda _, __, output, name=name: look(name, output))
            for name, part in task.net.named_modules()
            if name
        ]
        try:
            lost, _ = task.losses(batch)
        finally:
            for hook in hooks:
                hook.remove()
    look("the loss", lost)
    return found[0] if found else None


def hardest_windows(trainer: L.Trainer, task: L.LightningModule, batches: Mapping[int, Any]) -> str:
    """The windows, texts or pairs of a step that the model finds hardest, whence they are, and how they begin.

    Args:
        trainer: Of the run.
        task: Asked for the loss of each alone, as ``Stage.apart`` gives them.
        batches: This rank's, by their number in the epoch.

    Returns:
        Markdown; nothing of a task or data that know no windows.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
    knows_rows = all(isinstance(batch, Mapping) and "input_ids" in batch for batch in batches.values())
    if not (isinstance(task, Stage) and isinstance(data, OrderedData) and knows_rows):
        return ""
    windows = []
    with undisturbed(task), torch.no_grad(), trainer.precision_plugin.train_step_context():
        for number, batch in batches.items():
            for place, one in enumerate(task.apart(batch)):
                lost, counted = task.losses(one)
                if counted > 0:  # others only fill a batch up
                    windows.append(((lost / counted).item(), number, place, one))
    # Of NaN none is greater: what is not finite comes first.
    windows.sort(key=lambda window: -window[0] if window[0] == window[0] else float("-inf"))
    lines = []
    for loss, number, place, one in windows[:PLACES]:
        ids = one["input_ids"][0][: int(one["lengths"][0]) if "lengths" in one else None]
        text = " ".join(data.tokenizer.decode(ids.tolist()).split())
        lines.append(f"- loss {loss:.2f}, {data.whence(trainer.current_epoch, number, place)}: `{text[:EXCERPT]}`")
    return "\n".join(lines)
