"""``provenance.json``: where the run comes from."""

import json
import os
from typing import Any, ClassVar

import lightning as L

from lit_gpt_scratch.callbacks.run_dir import RunDirCallback
from lit_gpt_scratch.checkpoint.environment import collect_environment
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.errors import UserError


class RunMetadata(RunDirCallback):
    """Add this session to ``provenance.json``: command, code, versions, hardware, seed, fingerprints.

    What could change a result is in each checkpoint, too.

    Args:
        changed: What a resumed run changed: the value before and now, by name.
    """

    STATE_KEY: ClassVar = "Provenance"

    def __init__(self, changed: dict[str, tuple[Any, Any]] | None = None) -> None:
        self.changed = changed or {}
        self.origin: dict[str, Any] = {}
        """Code, versions, hardware, seed and data of this session."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make sure that all ranks go on from one checkpoint and learn from one text: each has looked for them.

        Raises:
            UserError: Another run was saved meanwhile, or another machine has other files.
        """
        super().setup(trainer, pl_module, stage)
        first, own = trainer.strategy.broadcast(str(trainer.ckpt_path)), str(trainer.ckpt_path)
        if first != own:
            raise UserError(f"one process would go on from {first}, another from {own}; name it: --ckpt_path {first}")
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        own = data.fingerprint if isinstance(data, BaseDataModule) else ""
        if trainer.strategy.broadcast(own) != own:
            raise UserError(f"{data.origin} is not the same on this machine as on the first; copy it from there")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it when nothing can be refused any more."""
        self.origin = collect_environment()
        session = {"started": self.origin.pop("started"), "command": self.origin.pop("command")}
        self.origin["hardware"] |= {"processes": trainer.world_size, "precision": str(trainer.precision)}
        self.origin["seed"] = int(os.environ.get("PL_GLOBAL_SEED", 0))
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if isinstance(data, BaseDataModule):
            self.origin["data"] = data.fingerprint
        if self.folder and trainer.is_global_zero:
            session = {"from_step": trainer.global_step, **session, **self.origin, "changed": self.changed}
            sessions = [*self.folder.read_sessions(), session]
            self.folder.write_text("provenance.json", json.dumps({"sessions": sessions}, indent=2, default=str) + "\n")

    @property
    def state_key(self) -> str:
        """Name of this callback's state in checkpoints, unchanged since 0.1 so that older checkpoints load."""
        return self.STATE_KEY

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on from the checkpoint alone compares itself with."""
        return self.origin
