"""What a run computed, in all its digits."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lit_gpt_scratch.callbacks.run_dir import RunDirCallback


class LossTrace(RunDirCallback):
    """Write ``trace.pt``: the loss of every step, and the whole gradient of the first, as it went into the optimizer.

    For ``--trainer.log_every_n_steps 1``: TensorBoard keeps float32, which is too coarse to compare two runs by.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        if not self.gradients:
            self.gradients = {n: _full_tensor(p.grad) for n, p in pl_module.named_parameters() if p.grad is not None}

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.folder and trainer.is_global_zero:
            losses = torch.tensor(self.losses, dtype=torch.float64)
            torch.save({"losses": losses, "gradients": self.gradients}, self.folder.path / "trace.pt")


def _full_tensor(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()
