"""A user's callback, outside of the package."""

import subprocess

import lightning as L


class CommandAtStep(L.Callback):
    """Runs a shell command once, after an optimizer step."""

    def __init__(self, step: int, command: str) -> None:
        self.step = step
        self.command = command

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            subprocess.run(self.command, shell=True, check=True)
