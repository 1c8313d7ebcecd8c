"""``provenance.json``: where the run comes from."""

import json
import os
from typing import Any

import lightning as L

from lit_gpt_scratch.callbacks.in_run_folder import InRunFolder
from lit_gpt_scratch.checkpoint.provenance import surroundings
from lit_gpt_scratch.data import PackedText


class Provenance(InRunFolder):
    """Add this session to ``provenance.json``: command, code, versions, hardware, seed, fingerprints.

    Args:
        changed: What a resumed run changed: the value before and now, by name.
    """

    def __init__(self, changed: dict[str, tuple[Any, Any]] | None = None) -> None:
        self.changed = changed or {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it when nothing can be refused any more."""
        if not (self.folder and trainer.is_global_zero):
            return
        session = {"from_step": trainer.global_step, **surroundings(), "changed": self.changed}
        session["hardware"] |= {"processes": trainer.world_size, "precision": str(trainer.precision)}
        session["seed"] = int(os.environ.get("PL_GLOBAL_SEED", 0))
        data = trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
        if isinstance(data, PackedText):
            session["data"] = data.store.fingerprint
        sessions = [*self.folder.sessions(), session]
        self.folder.write("provenance.json", json.dumps({"sessions": sessions}, indent=2, default=str) + "\n")
