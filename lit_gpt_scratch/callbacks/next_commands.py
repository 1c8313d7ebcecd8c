"""Suggest commands at the end of a run to use the model, train it longer, or show its curves."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import lightning as L
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt_scratch.callbacks.checkpointing import Checkpointing, time_is_up
from lit_gpt_scratch.callbacks.spike_guard import guard_gave_up
from lit_gpt_scratch.checkpoint.run_folder import RunFolder
from lit_gpt_scratch.data.base_datamodule import BaseDataModule
from lit_gpt_scratch.tasks.gpt_module import GPTModule

MODULE: Final = "python -m lit_gpt_scratch."


def next_commands(trainer: L.Trainer, folder: RunFolder, diverged: bool, max_time_is_a_flag: bool) -> Iterator[str]:
    """Yield the suggested shell commands for a finished run; commands that would fail are omitted.

    Args:
        trainer: Trainer of the finished run.
        folder: Run directory.
        diverged: Whether the loss is not finite, or the spike guard has stopped the run.
        max_time_is_a_flag: Whether the time limit of the run is set by ``--trainer.max_time``, not a custom ``Timer``.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    path, task = _quote(folder.path), trainer.lightning_module
    if saving := next((callback for callback in callbacks if isinstance(callback, Checkpointing)), None):
        best = saving.best_checkpoint() if isinstance(task, GPTModule) and task.tests_best else None
        yield MODULE + (f"doctor {path}" if diverged else _use_model(trainer, _quote(best) if best else path))
        if not guard_gave_up(trainer) and (flags := _flags_to_continue(trainer, max_time_is_a_flag)):
            yield f"{MODULE}fit --ckpt_path {path} {' '.join(flags)}"
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            yield f"tensorboard --logdir {_quote(Path(logger.save_dir or '.'))}"


def _use_model(trainer: L.Trainer, path: str) -> str:
    """Return the command suggested by the task, or by the data module if the task suggests none."""
    task, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]  # the trainer sets it late
    suggested = (getattr(each, "next_command", None) for each in (task, data))
    command = next(filter(None, suggested), BaseDataModule.next_command)
    text = data.example_text if isinstance(data, BaseDataModule) else ""
    custom = task.gpt.custom_classes.values() if isinstance(task, GPTModule) else ()
    trust = [f" --trust {name}" for name in custom if command.startswith(("generate", "evaluate"))]
    return command.format(path, text=shlex.quote(text or "...")) + "".join(trust)


def _flags_to_continue(trainer: L.Trainer, max_time_is_a_flag: bool) -> list[str]:
    """Return the flags that continue a finished run, with each limit that the run reached doubled.

    If a callback stopped the run, the only flag is ``--force``. The list is empty if the run reached a time limit that
    is not set by a flag.
    """
    flags = []
    if 0 < trainer.max_steps <= trainer.global_step:
        flags.append(f"--trainer.max_steps {2 * trainer.global_step}")
    epochs: Any = trainer.fit_loop.epoch_progress.current  # the declared type is a base class without this count
    if 0 < (trainer.max_epochs or 0) <= epochs.processed:
        flags.append(f"--trainer.max_epochs {2 * (trainer.max_epochs or 0)}")
    if time_is_up(trainer):
        if not max_time_is_a_flag:
            return []
        flags.append(f"--trainer.max_time {_format_time(2 * _time_limit(trainer))}")
    return flags or ["--force"]  # a callback stopped the run


def _time_limit(trainer: L.Trainer) -> float:
    """Return the time limit across all sessions in seconds."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    timers = (callback for callback in callbacks if isinstance(callback, Timer))
    return max(timer.time_elapsed() + (timer.time_remaining() or 0.0) for timer in timers)


def _format_time(seconds: float) -> str:
    """Format a duration as DD:HH:MM:SS, the format of ``--trainer.max_time``."""
    minutes, rest = divmod(max(1, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days:02}:{hours:02}:{minutes:02}:{rest:02}"


def _quote(path: Path) -> str:
    """Quote a path for a shell, after adding ``./`` to a path that starts with ``-`` and would be parsed as a flag."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
