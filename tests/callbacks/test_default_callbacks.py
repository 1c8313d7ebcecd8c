"""All callbacks of `fit` together."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler

from lit_gpt_scratch.callbacks.default_callbacks import HOOKS_OF_A_BATCH, drop_idle_hooks

Build = Callable[..., Any]


class Heard(Callback):
    """Has a hook for batches, and one that is not."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.heard.append("step")

    def on_train_end(self, *_: Any) -> None:
        self.heard.append("end")


class Asked(Profiler):
    """Keeps what the trainer goes through it for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def start(self, action_name: str) -> None:
        self.names.add(action_name)

    def stop(self, action_name: str) -> None:
        pass


@pytest.mark.parametrize("dropped", [True, False])
def test_the_trainer_passes_over_idle_hooks_alone(
    packed_text: Build, trainer: Build, task: Build, dropped: bool
) -> None:
    callback, profiler = Heard(), Asked()
    if dropped:
        drop_idle_hooks(callback)
    run: L.Trainer = trainer(
        max_steps=2, callbacks=[callback], profiler=profiler, limit_val_batches=1, val_check_interval=2
    )
    run.fit(task(), packed_text())
    assert callback.heard == ["step", "step", "end"]
    called = {hook for hook in HOOKS_OF_A_BATCH if f"[Callback]Heard.{hook}" in profiler.names}
    assert called == ({"on_train_batch_end"} if dropped else set(HOOKS_OF_A_BATCH))
    assert "[Callback]Heard.on_train_epoch_start" in profiler.names
