"""How a trainer writes and reads checkpoints."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
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
    """``SealedCheckpointIO`` in a thread; what fails is raised by the next save or at the end.

    A save waits for the one before, so that there is one copy of the state at most, in the host's memory. A file is
    removed in its turn, when those before it are written, and only if they were.
    """

    def __init__(self) -> None:
        super().__init__(SealedCheckpointIO())
        self._last: Future[None] | None = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if self._last is not None:
            self._last.result()
        if self._error is not None:
            raise self._error
        copied = apply_to_collection(checkpoint, torch.Tensor, lambda t: t.detach().to("cpu", copy=True))
        self._submit("save_checkpoint", copied, path)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        self._submit("remove_checkpoint", path)

    def _submit(self, method: str, *args: Any) -> None:
        self._ensure_setup()
        assert self._executor is not None
        self._last = self._executor.submit(self._in_turn, method, *args)

    def _in_turn(self, method: str, *args: Any) -> None:
        if self._error is None:
            try:
                getattr(self.checkpoint_io, method)(*args)
            except Exception as error:  # whatever a save can fail with is for the training's thread to raise
                self._error = error
