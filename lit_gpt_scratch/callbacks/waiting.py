"""How long training waits for its data."""

import time
from typing import Any

from lightning.pytorch.profilers import Profiler

FETCH = "[_TrainingEpochLoop].train_dataloader_next"
"""Lightning's name for fetching a training batch. It tells no callback when that begins, only the profiler."""


class WaitingForData:
    """A profiler that adds up the seconds of fetching batches; all else is for the profiler that the user chose."""

    def __init__(self, chosen: Profiler) -> None:
        self.chosen = chosen
        self.profile = chosen.profile  # asked for around every hook of every callback, so not by __getattr__
        self._began = self._seconds = 0.0

    def start(self, action_name: str) -> None:
        """Start the clock."""
        self.chosen.start(action_name)
        if action_name == FETCH:
            self._began = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Stop it."""
        if action_name == FETCH:
            self._seconds += time.perf_counter() - self._began
        self.chosen.stop(action_name)

    def take(self) -> float:
        """Seconds since the last time."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self.chosen, name)
