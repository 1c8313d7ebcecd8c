"""How a trainer writes and reads checkpoints."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from typing_extensions import override

from lit_gpt_scratch.checkpoint.sealed import refuse_altered, save


class SealedCheckpointIO(TorchCheckpointIO):
    """How a trainer writes and reads checkpoints: ``Trainer(plugins=[SealedCheckpointIO()])``.

    Tensors and plain data alone are read, whatever the trainer asks for: a checkpoint runs no code.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        save(checkpoint, Path(path))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        refuse_altered(Path(path))
        loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        return loaded


class BackgroundCheckpointIO(AsyncCheckpointIO):
    """``SealedCheckpointIO`` in a thread, a file after the other; what fails is raised by the next save or at the end.

    A file is removed in its turn, when those before it are written, and only if they were.
    """

    def __init__(self) -> None:
        super().__init__(SealedCheckpointIO())

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        self._ensure_setup()
        assert self._executor is not None
        self._executor.submit(self._remove_in_turn, path)

    def _remove_in_turn(self, path: str | Path) -> None:
        if self._error is None:
            super().remove_checkpoint(path)
