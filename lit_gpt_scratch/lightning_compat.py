"""Wrappers around the Lightning internals that this package uses.

Lightning may change these internals without notice. ``tests/test_lightning_compat.py`` fails if one of them changes, or
if another module of this package accesses a private attribute.
"""

import os
import signal
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from torch.distributed import default_pg_timeout, distributed_c10d
from typing_extensions import override

FETCH_BATCH_ACTION: Final = "[_TrainingEpochLoop].train_dataloader_next"
"""Name of the profiler action for fetching a training batch; no callback hook runs when fetching starts."""


def global_seed() -> int:
    """Return the seed set by ``seed_everything``, or 0 if unset; Lightning passes the seed to launched processes."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether gradients accumulate beyond this micro-batch.

    The last micro-batch of an epoch always completes an optimizer step.
    """
    return trainer.fit_loop._should_accumulate()


def is_validating_between_steps(trainer: Trainer) -> bool:
    """Return whether ``fit`` is validating between optimizer steps, rather than between micro-batches of one step."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fit_loop._should_accumulate()


def can_stop_early(trainer: Trainer) -> bool:
    """Return whether ``min_steps`` and ``min_epochs`` have been reached, so that ``should_stop`` takes effect."""
    return bool(trainer.fit_loop._can_stop_early)


def set_logging_step(trainer: Trainer, step: int) -> None:
    """Set the step number that Lightning uses for logging, because its count is off by one after resuming."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def set_saved_logging_step(fit_loop_state: dict[str, Any], step: int) -> None:
    """Set the logging step in a saved fit-loop state, ``checkpoint["loops"]["fit_loop"]``."""
    fit_loop_state["epoch_loop.state_dict"]["_batches_that_stepped"] = step


def disable_signal_handlers(trainer: Trainer) -> None:
    """Prevent Lightning from installing its own signal handlers, which call collective operations."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def restore_weights_and_optimizers(trainer: Trainer, path: Path) -> None:
    """Load the weights and optimizer states from a checkpoint during training, without resetting the loops.

    ``fit(ckpt_path=...)`` would reset the loops. ``trainer.ckpt_path`` and the path in the checkpoint connector keep
    the values from the start of the run.
    """
    connector = trainer._checkpoint_connector
    started_with = connector._ckpt_path
    connector.resume_start(path, weights_only=True)
    connector.restore_model()
    connector.restore_optimizers()
    connector.resume_end()
    connector._ckpt_path = started_with


def collective_timeout(trainer: Trainer) -> timedelta:
    """Return the timeout of the strategy's process group, which other groups do not inherit."""
    return getattr(trainer.strategy, "_timeout", None) or default_pg_timeout


def trains_in_this_process(trainer: Trainer) -> bool:
    """Return whether this process is a rank, instead of only starting the ranks, as with ``ddp_spawn``."""
    return not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def kill_child_processes(trainer: Trainer) -> None:
    """Kill the ranks that this process launched as subprocesses; they would wait forever for a terminated rank."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))


class SizedModelParallelStrategy(ModelParallelStrategy):
    """A ``ModelParallelStrategy`` whose tensor-parallel size is chosen when the number of processes is known."""

    def choose_tensor_parallel_size(self) -> int:
        """Return the number of ranks that share a model replica, which must divide the number of processes."""
        raise NotImplementedError

    @override
    def _setup_distributed(self) -> None:
        self._tensor_parallel_size = self.choose_tensor_parallel_size()
        self._data_parallel_size = self.num_processes * self.num_nodes // self._tensor_parallel_size
        super()._setup_distributed()

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        for group in self.device_mesh.get_all_groups():  # they have torch's default timeout
            distributed_c10d._set_pg_timeout(self._timeout or default_pg_timeout, group)


class SingleThreadCheckpointIO(AsyncCheckpointIO):
    """An ``AsyncCheckpointIO`` that can run any method of the wrapped plugin in its worker thread, in order.

    The base class runs only ``save_checkpoint`` in the thread. It raises an exception from a failed save at the next
    save or in ``teardown``.
    """

    def __init__(self, checkpoint_io: CheckpointIO) -> None:
        super().__init__(checkpoint_io)

    @property
    def error(self) -> BaseException | None:
        """Exception raised by the first failed call, or None; ``teardown`` raises the exception again."""
        return self._error

    def submit(self, method: str, *args: Any) -> "Future[None]":
        """Call a method of the wrapped plugin in the worker thread, unless an earlier call failed."""
        self._ensure_setup()
        assert self._executor is not None
        return self._executor.submit(self._run, method, *args)

    def _run(self, method: str, *args: Any) -> None:
        if self._error is None:
            try:
                getattr(self.checkpoint_io, method)(*args)
            except Exception as error:  # raised again in the main thread
                self._error = error
