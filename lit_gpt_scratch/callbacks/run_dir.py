"""What a callback needs to write into the run's folder."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from lit_gpt_scratch.checkpoint.run_folder import RunFolder


class RunDirCallback(Callback):
    """Knows the run's folder on every rank; ``None`` in a ``fast_dev_run``, which leaves nothing behind.

    ``fit`` sets ``folder`` on the first rank. By hand nobody does, and the logger's folder is the run's.
    """

    folder: RunFolder | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask the first rank; all ranks have to ask, because asking is a collective."""
        self.folder = trainer.strategy.broadcast(self.folder)
        if self.folder is None:
            log_dir = trainer.log_dir
            fast_dev_run: int = trainer.fast_dev_run  # type: ignore[attr-defined]  # the trainer sets it late
            self.folder = RunFolder(Path(log_dir)) if log_dir and not fast_dev_run else None
