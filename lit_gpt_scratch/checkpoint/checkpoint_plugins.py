"""Lightning plugins that read and write checkpoints, in one file or sharded, also in a background thread."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from typing_extensions import override

from lit_gpt_scratch.checkpoint.checkpoint_io import load_archive, save_checkpoint
from lit_gpt_scratch.checkpoint.sharded_checkpoint import (
    ShardedCheckpoint,
    is_sharded,
    remove_checkpoint,
    remove_replaced,
    save_sharded,
    set_aside,
    tensor_identity,
)
from lit_gpt_scratch.lightning_compat import SingleThreadCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning plugin for atomic, checksummed checkpoints: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    It also loads sharded checkpoints. Only tensors and plain data are loaded: ``weights_only=True`` is always used,
    regardless of the Trainer's argument, so that a checkpoint cannot run code when it is loaded.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        set_aside(Path(path), sharded=False)
        save_checkpoint(checkpoint, Path(path))
        remove_replaced(Path(path))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return ShardedCheckpoint.open(Path(path)).load() if is_sharded(Path(path)) else load_archive(Path(path))

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        remove_checkpoint(Path(path))


class ShardedCheckpointIO(AtomicCheckpointIO):
    """Lightning plugin for sharded checkpoints: ``Trainer(plugins=[ShardedCheckpointIO()])``.

    With the strategies ``fsdp2``, ``hsdp``, ``tp`` and ``fsdp2_tp``, each process writes and reads its own shards. With
    other strategies, one process writes the whole checkpoint.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint; ``storage_options`` is the process group whose ranks all call this method, if any."""
        save_sharded(checkpoint, Path(path), storage_options)


class BackgroundCheckpointIO(SingleThreadCheckpointIO):
    """Lightning plugin that runs another checkpoint plugin in a background thread.

    An error in the thread is raised by the next save or at the end of the run. Each save waits for the previous save to
    finish, so at most one copy of the state is held in host memory. Checkpoints are removed in the same thread after
    pending saves have finished; if a save has failed, no checkpoint is removed.

    Args:
        checkpoint_io: The plugin that writes the checkpoints; by default, an ``AtomicCheckpointIO``.
    """

    def __init__(self, checkpoint_io: AtomicCheckpointIO | None = None) -> None:
        super().__init__(checkpoint_io or AtomicCheckpointIO())
        self._last: Future[None] | None = None

    def wait(self) -> None:
        """Wait until the pending saves have finished.

        Raises:
            Exception: A save has failed.
        """
        if self._last is not None:
            self._last.result()
        if self.error is not None:
            raise self.error

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        self.wait()  # it may be the checkpoint that is being saved
        assert self.checkpoint_io is not None
        return self.checkpoint_io.load_checkpoint(path, map_location, weights_only)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        self.wait()
        copies: dict[Any, torch.Tensor] = {}  # tied weights are copied once

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            identity = tensor_identity(tensor)
            if identity not in copies:
                copies[identity] = tensor.detach().to("cpu", copy=True)
            return copies[identity]

        copied = apply_to_collection(checkpoint, torch.Tensor, copy)
        self._last = self.submit("save_checkpoint", copied, path, storage_options)

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        self._last = self.submit("remove_checkpoint", path)
