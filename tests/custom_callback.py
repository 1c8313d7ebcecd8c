"""A user's callback, outside of the package."""

import os
import signal
import subprocess
import time

import lightning as L

from lit_gpt_scratch.errors import UserError


class CommandAtStep(L.Callback):
    """Runs a shell command once, after an optimizer step."""

    def __init__(self, step: int, command: str) -> None:
        self.step = step
        self.command = command

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            subprocess.run(self.command, shell=True, check=True)


class FailOnRank(L.Callback):
    """One rank fails after an optimizer step: a mistake, a bug, no disk, a crash, or it hangs or is stopped."""

    def __init__(self, rank: int, kind: str, step: int = 3) -> None:
        self.rank, self.kind, self.step = rank, kind, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step != self.step or trainer.global_rank != self.rank:
            return
        if self.kind == "mistake":
            raise UserError("the file is invalid; repair it")
        if self.kind == "bug":
            raise KeyError("no such thing")
        if self.kind == "full disk":
            raise OSError(28, "No space left on device", "/data/file")
        if self.kind == "hangs":
            time.sleep(600)
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[self.kind])
