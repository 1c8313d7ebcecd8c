"""``config.yaml``: every flag of a run."""

import json
from typing import Any

import lightning as L
from jsonargparse import ArgumentParser, Namespace

from lit_gpt_scratch.callbacks.checkpointing import RunDirCallback


class SaveConfig(RunDirCallback):
    """``config.yaml`` in the run's folder, written when nothing can be refused any more.

    Args:
        parser: Knows how to write the flags.
        config: The flags.
    """

    def __init__(self, parser: ArgumentParser, config: Namespace) -> None:
        self.parser = parser
        self.config = config

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write every flag of the run, but not that it was resumed: the file also starts another run alike."""
        if self.folder and trainer.is_global_zero:
            config = self.config.clone()
            config.ckpt_path, config.force = None, False
            self.folder.write_text(self.folder.config.name, self.parser.dump(config, skip_unset=False))


def config_to_dict(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """A config as nested plain data, as its file has it; the files of two runs are compared."""
    nested: dict[str, Any] = json.loads(parser.dump(config, format="json", skip_unset=False, skip_validation=True))
    return nested
