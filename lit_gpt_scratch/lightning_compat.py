"""Wrappers around the Lightning internals that this package uses.

Lightning may change these internals without notice. ``tests/test_lightning_compat.py`` fails if one of them changes, or
if another module of this package accesses a private attribute.
"""

import math
import os
import signal
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from jsonargparse import set_parsing_settings
from jsonargparse._common import parsing_settings
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from torch.distributed import default_pg_timeout, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lit_gpt_scratch.errors import UserError

FETCH_BATCH_ACTION: Final = "[_TrainingEpochLoop].train_dataloader_next"
"""Name of the profiler action for fetching a training batch; no callback hook runs when fetching starts."""


def global_seed() -> int:
    """Return the seed set by ``seed_everything``, or 0 if unset; Lightning passes the seed to launched processes."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether more micro-batches follow this micro-batch in the same optimizer step.

    The last micro-batch of an epoch always completes an optimizer step.
    """
    return trainer.fit_loop._should_accumulate()


def is_validating_between_steps(trainer: Trainer) -> bool:
    """Return whether ``fit`` is validating between optimizer steps, rather than between micro-batches of one step."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fit_loop._should_accumulate()


def can_stop_early(trainer: Trainer) -> bool:
    """Return whether ``min_steps`` and ``min_epochs`` have been reached, so that ``should_stop`` takes effect."""
    return bool(trainer.fit_loop._can_stop_early)


def set_max_steps(trainer: Trainer, steps: int) -> None:
    """Set the number of optimizer steps after which a trainer that has not started stops."""
    trainer.fit_loop.epoch_loop.max_steps = steps


def set_logging_step(trainer: Trainer, step: int) -> None:
    """Set the step number that Lightning uses for logging; after resuming, Lightning's own number is off by one."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def set_saved_logging_step(fit_loop_state: dict[str, Any], step: int) -> None:
    """Set the logging step in a saved fit-loop state, ``checkpoint["loops"]["fit_loop"]``."""
    fit_loop_state["epoch_loop.state_dict"]["_batches_that_stepped"] = step


class StagedAccumulation(Callback):
    """Callback that sets ``trainer.accumulate_grad_batches`` before each micro-batch; it must precede other callbacks.

    Unlike in a ``GradientAccumulationScheduler``, the number may change within an epoch.

    Args:
        phases: First micro-batch, end (exclusive), and micro-batches per step of each phase of the run. Micro-batches
            are counted from the start of the run, and phases contain only whole steps.
    """

    def __init__(self, phases: Sequence[tuple[int, float, int]]) -> None:
        self.phases = phases
        self.current = phases[0][2]
        """Number of micro-batches in the current step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the number for the last micro-batch before a resumed run continues, which ended a step."""
        self._set_accumulation(trainer, max(trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1, 0))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the number for this micro-batch."""
        self._set_accumulation(trainer, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the final number, with which another run may start."""
        trainer.accumulate_grad_batches = self.phases[-1][2]

    def _set_accumulation(self, trainer: Trainer, batch_idx: int) -> None:
        micro_batch = trainer.current_epoch * trainer.num_training_batches + batch_idx
        self.current = next(size for _, end, size in self.phases if micro_batch < end)
        trainer.accumulate_grad_batches = self.current


def schedule_accumulation(trainer: Trainer, phases: Sequence[tuple[int, float, int]]) -> None:
    """Add a ``StagedAccumulation`` to a trainer, in place of an earlier one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    others = [callback for callback in callbacks if not isinstance(callback, StagedAccumulation)]
    trainer.callbacks = [StagedAccumulation(phases), *others]  # type: ignore[attr-defined]  # as above


def staged_accumulation(trainer: Trainer, constant: int) -> int:
    """Return the number of micro-batches in the current step that a ``StagedAccumulation`` sets, or else ``constant``.

    Another callback may have set ``trainer.accumulate_grad_batches`` to a different number.
    """
    callbacks = _accumulation_callbacks(trainer)
    return next((each.current for each in callbacks if isinstance(each, StagedAccumulation)), constant)


def planned_steps(trainer: Trainer) -> float:
    """Return the number of optimizer steps that the step and epoch limits allow, or infinity without limits.

    Unlike ``estimated_stepping_batches``, this number accounts for callbacks that change the accumulation.
    """
    steps = trainer.estimated_stepping_batches  # also sets up the dataloader, on which the number of batches depends
    if trainer.max_epochs in (None, -1) or not _accumulation_callbacks(trainer):
        return steps
    per_epoch = int(trainer.num_training_batches)
    length = max(trainer.max_epochs or 0, 1) * per_epoch
    total = sum(
        _count_steps(min(end, length), per_epoch, size) - _count_steps(first, per_epoch, size)
        for first, end, size in _accumulation_phases(trainer)
        if first < length
    )
    return total if trainer.max_steps == -1 else min(total, trainer.max_steps)


def batches_in_steps(trainer: Trainer, steps: int) -> int:
    """Return the number of micro-batches in the first ``steps`` steps; the last step of an epoch may be shorter."""
    if math.isinf(trainer.num_training_batches):
        return steps * trainer.accumulate_grad_batches
    per_epoch, batches = int(trainer.num_training_batches), 0
    for first, end, size in _accumulation_phases(trainer):
        steps += _count_steps(first, per_epoch, size)  # as if the whole run had steps of this size
        epochs, rest = divmod(steps, math.ceil(per_epoch / size))
        batches = epochs * per_epoch + min(rest * size, per_epoch)
        if batches <= end:
            break
        steps -= _count_steps(end, per_epoch, size)
    return batches


def _count_steps(batches: float, per_epoch: int, size: int) -> int:
    """Return the number of steps of ``size`` micro-batches in the first ``batches`` micro-batches of a run."""
    epochs, rest = divmod(int(batches), per_epoch)
    return epochs * math.ceil(per_epoch / size) + math.ceil(rest / size)


def _accumulation_callbacks(trainer: Trainer) -> list[StagedAccumulation | GradientAccumulationScheduler]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    return [each for each in callbacks if isinstance(each, StagedAccumulation | GradientAccumulationScheduler)]


def _accumulation_phases(trainer: Trainer) -> Iterator[tuple[int, float, int]]:
    """Yield (first micro-batch, end, micro-batches per step) for each phase of the run."""
    callback = next(iter(_accumulation_callbacks(trainer)), None)
    if callback is None:
        yield 0, math.inf, trainer.accumulate_grad_batches
    elif isinstance(callback, StagedAccumulation):
        yield from callback.phases
    else:
        per_epoch = int(trainer.num_training_batches)
        for first, end in zip(callback.epochs, [*callback.epochs[1:], math.inf], strict=True):
            yield first * per_epoch, end * per_epoch, callback.get_accumulate_grad_batches(first)


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
    """Return the timeout of the strategy's process group; other process groups do not inherit this timeout."""
    return getattr(trainer.strategy, "_timeout", None) or default_pg_timeout


def set_collective_timeout(strategy: Strategy, timeout: timedelta) -> None:
    """Set the timeout of a strategy's process group, before it is created.

    Raises:
        UserError: The timeout is not positive, or the strategy has a single process or its own timeout.
    """
    if timeout <= timedelta():
        raise UserError(f"--collective_timeout is {timeout}; it must be positive")
    if not hasattr(strategy, "_timeout"):
        name = type(strategy).__name__
        raise UserError(f"--collective_timeout is not supported with {name}, which has a single process; omit it")
    if strategy._timeout not in (None, default_pg_timeout):
        raise UserError("--collective_timeout and --trainer.strategy.timeout are both set; set only one of them")
    strategy._timeout = timeout


def trains_in_this_process(trainer: Trainer) -> bool:
    """Return whether this process is itself a rank; with ``ddp_spawn``, for example, it only starts the ranks."""
    return not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def failed_child_processes(trainer: Trainer) -> dict[int, int]:
    """Return the exit codes of the ranks that this process launched and that have failed, keyed by rank.

    The exit code of a process that was killed by a signal is negative.
    """
    launcher = trainer.strategy.launcher
    processes = launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []
    codes = {trainer.global_rank + number: process.poll() for number, process in enumerate(processes, start=1)}
    return {rank: code for rank, code in codes.items() if code}


class UnobservedLauncher(_SubprocessScriptLauncher):
    """A launcher that leaves this process alive if a process that it launched fails.

    Lightning would kill this process within five seconds, without a message and while it may be saving a checkpoint.
    """

    @override
    def launch(self, function: Any, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        if not self.cluster_environment.creates_processes_externally:
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
            self._call_children_scripts()
            _set_num_threads_if_needed(num_processes=self.num_processes)
            return function(*args, **kwargs)
        return super().launch(function, *args, trainer=trainer, **kwargs)


def replace_launcher(strategy: Strategy) -> None:
    """Replace Lightning's launcher of processes, if the strategy has it, with an ``UnobservedLauncher``."""
    launcher = strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        strategy._launcher = UnobservedLauncher(
            launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
        )


def kill_child_processes(trainer: Trainer) -> None:
    """Kill the ranks that this process launched as subprocesses; they would wait forever for a terminated rank."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))


def multiprocessing_start_method(strategy: Strategy) -> str | None:
    """Return the ``multiprocessing`` start method of a strategy: ``fork``, ``forkserver`` or ``spawn``.

    Returns None if the strategy starts no processes, or runs a script in each process.
    """
    launcher = strategy.launcher
    return launcher._start_method if isinstance(launcher, _MultiProcessingLauncher) else None


def start_as_scripts(strategy: DDPStrategy) -> None:
    """Replace a strategy's launcher with the ``ddp`` launcher, which runs the current script in each process."""
    strategy._start_method = "popen"
    strategy._configure_launcher()


@contextmanager
def restrict_imports(allowed: Collection[str]) -> Iterator[None]:
    """Restrict the imports of ``LightningCLI``'s parser to the given packages, classes and functions.

    The parser imports the classes and functions named in a config and in the files that it refers to. Members of an
    allowed package or class are also allowed. Any other import raises an error that contains ``Importing 'NAME' is
    not allowed``. The parser's settings are global and can only be extended, so they are restored from a copy.
    """
    before = dict(parsing_settings)
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[name for name in allowed if name.partition(".")[0] != "jsonargparse"],  # not accepted
        validate_subclass_spec_in_any=True,
    )
    try:
        yield
    finally:
        parsing_settings.update(before)


class SizedModelParallelStrategy(ModelParallelStrategy):
    """A ``ModelParallelStrategy`` whose device mesh is chosen once the number of processes is known.

    Args:
        cpu_offload: Whether sharded weights stay on the CPU. Collective operations then support its tensors as well.
    """

    def __init__(self, cpu_offload: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.cpu_offload = cpu_offload

    @override
    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        return "cpu:gloo,cuda:nccl" if self.cpu_offload and backend == "nccl" else backend

    @override
    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        self.model._apply(  # type: ignore[no-untyped-call]  # torch's
            lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(self.root_device)
        )
        _update_properties(self.model, device=self.root_device)

    def choose_tensor_parallel_size(self) -> int:
        """Return the size of a tensor-parallel group, which must divide the number of processes."""
        raise NotImplementedError

    @property
    def collective_timeout(self) -> timedelta:
        """Timeout of collective operations; a new process group does not inherit it."""
        return self._timeout or default_pg_timeout

    def build_device_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """Return the mesh to use instead of Lightning's, which has the dimensions data and tensor parallel."""
        return mesh

    @override
    def _setup_distributed(self) -> None:
        self._tensor_parallel_size = self.choose_tensor_parallel_size()
        self._data_parallel_size = self.num_processes * self.num_nodes // self._tensor_parallel_size
        super()._setup_distributed()

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.lightning_module is not None
        self._device_mesh = self.lightning_module._device_mesh = self.build_device_mesh(self.device_mesh)
        for group in self.device_mesh.get_all_groups():  # they have torch's default timeout
            distributed_c10d._set_pg_timeout(self.collective_timeout, group)


class SingleThreadCheckpointIO(AsyncCheckpointIO):
    """An ``AsyncCheckpointIO`` that can run any method of the wrapped plugin in its worker thread, in order.

    The base class runs only ``save_checkpoint`` in the thread. It raises an exception from a failed save at the next
    save or in ``teardown``.
    """

    def __init__(self, checkpoint_io: CheckpointIO) -> None:
        super().__init__(checkpoint_io)

    @property
    def error(self) -> BaseException | None:
        """Exception raised by the first failed call, or None if no call failed; ``teardown`` raises it again."""
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
