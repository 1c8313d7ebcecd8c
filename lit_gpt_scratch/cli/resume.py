"""Resume a run: find its checkpoint, check for remaining steps, and detect changes to the flags and environment."""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from typing_extensions import TypedDict

from lit_gpt_scratch.batch_types import BatchLayout
from lit_gpt_scratch.callbacks.checkpointing import Checkpointing, CheckpointingState
from lit_gpt_scratch.callbacks.summary import RunMetadata
from lit_gpt_scratch.checkpoint.config_diff import diff_configs
from lit_gpt_scratch.checkpoint.environment import collect_environment
from lit_gpt_scratch.checkpoint.loading import load_training_state
from lit_gpt_scratch.checkpoint.loop_state import BATCH_LAYOUT_KEY, count_finished_epochs, normalize_progress
from lit_gpt_scratch.checkpoint.resume_stress_test import FINISHED_MESSAGE
from lit_gpt_scratch.checkpoint.run_folder import RunFolder, SessionFacts, find_checkpoint
from lit_gpt_scratch.checkpoint.training_state import validate_callback_state, validate_like
from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.schema import read_json

log = logging.getLogger(__name__)

Changes = dict[str, tuple[Any, Any]]
T = TypeVar("T")


class TrainSeconds(TypedDict):
    """Elapsed training time of a ``Timer`` in seconds."""

    train: float


class TimerState(TypedDict):
    """State of Lightning's ``Timer`` in a checkpoint."""

    time_elapsed: TrainSeconds


OUTPUT_FLAGS: Final = r"runs|experiment|ckpt_path|force|plan|devices_like|config|trust|budget|scaling_law"
"""Flags that do not affect training."""
FREE_TO_CHANGE: Final = r"data\.init_args\.(num_workers|cache|store|processes|streaming)"
"""Data flags that may change when a run is resumed, because they do not affect its results."""
CHECKED_BY_CHECKPOINT: Final = r"model\.init_args\.gpt\..*|data\.init_args\.(vocab_size|block_size)"
"""Flags that are compared with the checkpoint's metadata; a mismatch is an error even with ``--force``."""
MUST_MATCH: Final = (
    r"model\..*|data\..*|seed_everything|trainer\.(precision|accumulate_grad_batches|gradient_clip_val|"
    r"gradient_clip_algorithm|limit_train_batches|overfit_batches)"
)
"""Flags that must not change, because they determine the data, its order, or the computation of a step."""
BATCH_FLAGS: Final = r"processes|data\.init_args\.(batch_size|tokens_per_step)|trainer\.accumulate_grad_batches"
"""Flags that divide a step's samples among micro-batches and processes; the number of samples must stay the same."""
NODE_RANKS: Final = ("NODE_RANK", "GROUP_RANK", "SLURM_NODEID")
"""Environment variables in which Lightning, torchrun and SLURM store the rank of this machine."""
OPTIMIZER: Final = "model.init_args.optimizer.class_path"


@dataclass
class ResumedRun:
    """A run that is resumed from a checkpoint.

    Attributes:
        checkpoint: Path to the checkpoint file.
        changed: Changes since earlier sessions of the run, as (old value, new value) pairs keyed by dotted name.
        origin: Code, library versions, hardware, seed and data fingerprint that are stored in the checkpoint.
        layout: Distribution of a step's samples over micro-batches and ranks, or None if it is not in the checkpoint.
    """

    checkpoint: Path
    changed: Changes = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    layout: BatchLayout | None = None

    @classmethod
    def find(cls, given: str, runs: Path, experiment: str) -> "ResumedRun | None":
        """Find the run specified by ``--ckpt_path``; return None if it is ``auto`` and no run has a checkpoint yet.

        Raises:
            UserError: The checkpoint does not exist, or all checkpoints are corrupted.
        """
        if given == "auto" and not RunFolder.has_checkpoint(runs, experiment):
            return None
        try:
            return cls(find_checkpoint("last" if given == "auto" else given, runs, experiment))
        except UserError as error:
            if any(os.environ.get(name, "0") != "0" for name in NODE_RANKS):
                raise UserError(
                    f"{error}; copy the run folder to every machine, or set --runs to a shared folder"
                ) from error
            raise

    @property
    def folder(self) -> RunFolder | None:
        """Run folder that contains the checkpoint, or None if the checkpoint is not in a run folder."""
        return RunFolder.containing(self.checkpoint)

    def require_folder(self, runs: str | None, experiment: str | None) -> None:
        """Check that ``--runs`` and ``--experiment``, if given, match the folder in which the run continues.

        Raises:
            UserError: The run continues in another folder, so a flag would have no effect.
        """
        if self.folder is None:
            return
        own = {"runs": self.folder.path.parents[1], "experiment": Path(self.folder.path.parent.name)}
        for flag, value in (("runs", runs), ("experiment", experiment)):
            if value is not None and (Path(value).resolve() if flag == "runs" else Path(value)) != own[flag]:
                raise UserError(
                    f"--{flag} is {value}, but --ckpt_path continues the run in {self.folder.path}; omit --{flag}, or "
                    f"start a new run with --model.init_from {self.checkpoint}"
                )

    def steps_done(self, trainer: Trainer, force: bool = False) -> int:
        """Return the number of optimizer steps in the checkpoint.

        Args:
            trainer: Trainer with the limits of the run.
            force: Whether to resume even if a callback stopped the run.

        Raises:
            UserError: The file is not a training checkpoint, or its run has reached its limits.
        """
        checkpoint = load_training_state(self.checkpoint)
        if "loops" not in checkpoint:
            raise UserError(
                f"{self.checkpoint} contains only weights, so its run cannot be resumed; "
                "start a new run from it with --model.init_from"
            )
        self.origin = dict(next(iter(_states(checkpoint, RunMetadata.state_key, SessionFacts)), {}))
        self.layout = BatchLayout(**checkpoint[BATCH_LAYOUT_KEY]) if BATCH_LAYOUT_KEY in checkpoint else None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
            saved = checkpoint["callbacks"].get(callback.state_key)
            if saved is not None and type(callback).__module__.startswith("lightning."):
                validate_like(saved, callback.state_dict(), f"callbacks.{type(callback).__name__}")
        step: int = checkpoint["global_step"]
        loop = checkpoint["loops"]["fit_loop"]
        normalize_progress(loop)
        saving = _states(checkpoint, Checkpointing.state_key, CheckpointingState)
        if any(state.get("validation_due") for state in saving):
            return step
        epochs = count_finished_epochs(loop)
        timers = _states(checkpoint, "Timer", TimerState)
        seconds = max((state["time_elapsed"]["train"] for state in timers), default=0.0)
        more = None
        if 0 < trainer.max_steps <= step:
            more = f"completed all {step} steps", f"--trainer.max_steps {2 * step}"
        elif 0 < (trainer.max_epochs or 0) <= epochs:
            more = f"completed all {epochs} epochs", f"--trainer.max_epochs {epochs + 1}"
        elif _seconds(trainer) <= seconds:
            more = (
                f"reached its time limit after {seconds:.0f} s",
                "a longer --trainer.max_time, which limits the total time of all sessions",
            )
        elif not force and any(state.get("stopped") for state in saving):
            more = f"been stopped early by a callback, at step {step}", "--force"
        if more and self._untested(checkpoint):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the trainer sets it late
                if isinstance(callback, Checkpointing):
                    callback.untested = True
        elif more:
            raise UserError(f"the run that saved {self.checkpoint} has {more[0]}; {FINISHED_MESSAGE} {more[1]}")
        return step

    def _untested(self, checkpoint: dict[str, Any]) -> bool:
        """Return whether the run has test data, but no test results yet."""
        saving = _states(checkpoint, Checkpointing.state_key, CheckpointingState)
        if self.folder is None or not any(state.get("tests") for state in saving):
            return False
        try:
            measured = read_json(self.folder.path / "summary.json", dict[str, Any])
        except (OSError, ValueError):  # the run was stopped before it wrote a summary, or the file is corrupted
            measured = {}
        return not any(name.startswith("test/") for name in measured)

    def compare(
        self, config_before: Mapping[str, Any], config: Mapping[str, Any], here: Mapping[str, Any], force: bool
    ) -> None:
        """Log changes since the run started, and reject changes that would make it a different run.

        Args:
            config_before: All flags of the run before this session.
            config: All flags of this session.
            here: Number of processes, number of data-parallel replicas, seed and data fingerprint in this session.
            force: Whether to warn about such changes instead of rejecting them.

        Raises:
            UserError: A flag in ``MUST_MATCH`` changed and ``force`` is False, or the optimizer class changed.
        """
        sessions = self.folder.read_sessions() if self.folder else []
        flags = diff_configs(config_before, config)
        self.changed = {name: values for name, values in flags.items() if not re.fullmatch(OUTPUT_FLAGS, name)}
        matters = [
            n
            for n in self.changed
            if re.fullmatch(MUST_MATCH, n) and not re.fullmatch(f"{FREE_TO_CHANGE}|{CHECKED_BY_CHECKPOINT}", n)
        ]
        before = dict(self.origin or (sessions[-1] if sessions else {}))
        if before:
            now = collect_environment()
            for part in ("versions", "hardware", "code"):
                known = {name: now[part].get(name) for name in before.get(part, {}) if name in now[part]}
                old = {name: before[part][name] for name in known}
                self.changed |= {f"{part}.{name}": values for name, values in diff_configs(old, known).items()}
            before |= {"processes": before.get("hardware", {}).get("processes")}
            model_changed = any(re.fullmatch(CHECKED_BY_CHECKPOINT, n) for n in self.changed)
            seed_flag_changed = "seed_everything" in self.changed
            for name in ("processes", *(() if seed_flag_changed else ("seed",)), *(() if model_changed else ("data",))):
                if before.get(name) not in (None, here.get(name)):
                    self.changed[name] = (before[name], here.get(name))
                    matters.append(name)
        if self.folder is None:
            log.warning(
                "%s is not in a run folder, so the flags of its run are unknown and are not compared", self.checkpoint
            )
        if OPTIMIZER in self.changed:
            raise UserError(
                f"{_describe_changes(self.changed, [OPTIMIZER])}: the states of different optimizers are incompatible; "
                "omit --model.optimizer, or start a new run with --model.init_from"
            )
        keep = "restore the old values"
        if self.layout is not None and any(re.fullmatch(BATCH_FLAGS, n) for n in matters):
            step = self.layout.rows_per_step, _samples_per_step(config, here["replicas"])
            if step[0] != step[1]:
                self.changed["samples per step"] = step
                matters.append("samples per step")
                tokens = step[0] * config["data"]["init_args"].get("block_size", 1)
                keep = f"keep the number of samples per step with --data.tokens_per_step {tokens}"
            elif not _counts_batches(config):
                matters = [n for n in matters if not re.fullmatch(BATCH_FLAGS, n)]
        if matters and not force:
            raise UserError(
                f"cannot resume {self.checkpoint}: {_describe_changes(self.changed, matters)}; {keep}, "
                "or resume anyway with --force"
            )
        if self.changed:
            log.warning("since the run started, %s", _describe_changes(self.changed, list(self.changed)))


def _samples_per_step(config: Mapping[str, Any], replicas: int) -> int | None:
    """Return the number of samples per optimizer step across all data-parallel replicas.

    Returns None for a user-defined data module without the arguments that determine this number.
    """
    data = config["data"]["init_args"]
    if not {"batch_size", "tokens_per_step", "block_size"} <= data.keys():
        return None
    if data["tokens_per_step"] is not None:
        return int(data["tokens_per_step"] // data["block_size"])
    return int(data["batch_size"] * replicas * config["trainer"]["accumulate_grad_batches"])


def _counts_batches(config: Mapping[str, Any]) -> bool:
    """Return whether an epoch is limited to a number of micro-batches, so that its length depends on the batch size."""
    limit, overfit = (config["trainer"].get(name) for name in ("limit_train_batches", "overfit_batches"))
    return isinstance(limit, int) or limit not in (None, 1.0) or bool(overfit)


def _states(checkpoint: dict[str, Any], callback: str, hint: type[T]) -> list[T]:
    states = checkpoint["callbacks"].items()
    return [
        validate_callback_state(state, hint, callback) for key, state in states if re.match(rf"{callback}\b", str(key))
    ]


def _seconds(trainer: Trainer) -> float:
    """Return the time limit in seconds across all sessions, or a very large number if there is no limit."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # the trainer sets it late
    limits = (
        callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)
    )  # nothing has run in this session, so all of the time remains
    return min((limit for limit in limits if limit is not None), default=timedelta.max.total_seconds())


def _describe_changes(changes: Changes, names: list[str]) -> str:
    def short(value: Any) -> str:
        text = str(value)
        if re.fullmatch(r"\w+(\.\w+)+\.[A-Z]\w+", text):  # import path of a class
            return text.rpartition(".")[2]
        return text if len(text) <= 24 else f"{text[:12]}..."

    each = (
        f"{n.replace('.init_args', '')} changed from {short(changes[n][0])} to {short(changes[n][1])}" for n in names
    )
    return ", ".join(each)
